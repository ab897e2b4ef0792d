#include "incipit-collective/src/gloo/shim.h"

#include <sched.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <exception>
#include <string>
#include <utility>

#include <gloo/rendezvous/context.h>
#include <gloo/rendezvous/store.h>
#include <gloo/transport/tcp/device.h>
#include <gloo/transport/unbound_buffer.h>

#include "incipit-collective/src/gloo/ffi.rs.h"

namespace incipit {

namespace {

using Clock = std::chrono::steady_clock;
using Milliseconds = std::chrono::milliseconds;

// Messages between two ranks keep their order, so that all exchanges can share a slot.
constexpr std::uint64_t kSlot = 0;
// Nothing is ever sent here.
constexpr std::uint64_t kSentinelSlot = 1;

// The store in which ranks look for each other's addresses is Rust's, and so are its deadlines. Gloo of 2022 knows both
// forms of `wait`.
class RustStore : public ::gloo::rendezvous::Store {
 public:
  explicit RustStore(const Bridge& bridge) : bridge_(bridge) {}

  void set(const std::string& key, const std::vector<char>& data) override {
    bridge_.set(rust::Str(key), rust::Slice<const std::uint8_t>(
                                    reinterpret_cast<const std::uint8_t*>(data.data()), data.size()));
  }

  std::vector<char> get(const std::string& key) override {
    auto value = bridge_.get(rust::Str(key));
    return std::vector<char>(value.begin(), value.end());
  }

  void wait(const std::vector<std::string>& keys) override {
    for (const auto& key : keys) {
      bridge_.get(rust::Str(key));
    }
  }

  void wait(const std::vector<std::string>& keys, const Milliseconds&) override { wait(keys); }

 private:
  const Bridge& bridge_;
};

Outcome outcome(Kind kind) { return Outcome{kind, {}, rust::String()}; }

Outcome outcome(Kind kind, int peer, const char* what) {
  rust::Vec<std::uint32_t> peers;
  peers.push_back(static_cast<std::uint32_t>(peer));
  return Outcome{kind, std::move(peers), rust::String::lossy(what)};
}

Milliseconds left(Clock::time_point end) {
  return std::max(std::chrono::duration_cast<Milliseconds>(end - Clock::now()), Milliseconds(0));
}

}  // namespace

Port::Port(std::shared_ptr<::gloo::transport::Device> device) : device(std::move(device)) {}
Port::~Port() = default;

std::unique_ptr<Port> open_port(rust::Str interface, rust::Str host) {
  ::gloo::transport::tcp::attr attr;
  attr.iface = std::string(interface);
  attr.hostname = std::string(host);
  std::shared_ptr<::gloo::transport::Device> device;
  std::exception_ptr failure;
  std::thread creator([&] {
    // The thread that serves the connections inherits this. While another thread sends on a connection, Gloo of 2022 has it
    // look again and again whether it may (`Pair::handleEvents`). Where there are more threads than cores it would do so in
    // the sender's stead, until the next tick of the clock, 4 ms later. A batch thread does not push others aside: a training
    // step over two processes on two cores took a third of the time. Where the system refuses, it is only slower.
    struct sched_param parameter = {};
    sched_setscheduler(0, SCHED_BATCH, &parameter);
    try {
      device = ::gloo::transport::tcp::CreateDevice(attr);
    } catch (...) {
      failure = std::current_exception();
    }
  });
  creator.join();
  if (failure) {
    std::rethrow_exception(failure);
  }
  return std::make_unique<Port>(std::move(device));
}

std::unique_ptr<Group> connect(const Port& port, std::uint32_t rank, std::uint32_t size,
                               std::uint64_t milliseconds, const Bridge& store) {
  auto context = std::make_shared<::gloo::rendezvous::Context>(static_cast<int>(rank), static_cast<int>(size));
  // A pair waits five times as long for its connection (`Pair::waitUntil`).
  context->setTimeout(std::max(Milliseconds(milliseconds / 5), Milliseconds(1)));
  RustStore keys(store);
  auto device = port.device;
  context->connectFullMesh(keys, device);
  auto group = std::make_unique<Group>(std::move(context));
  group->start();
  return group;
}

Group::Group(std::shared_ptr<::gloo::rendezvous::Context> context)
    : context_(std::move(context)), peers_(context_->size) {}

void Group::start() {
  for (int peer = 0; peer < context_->size; peer++) {
    if (peer == context_->rank) {
      continue;
    }
    Buffer sentinel = context_->createUnboundBuffer(&peers_[peer].never, 1);
    sentinel->recv(peer, kSentinelSlot);
    watchers_.emplace_back([this, peer, sentinel = std::move(sentinel)]() mutable { watch(peer, std::move(sentinel)); });
  }
}

Group::~Group() {
  close();
  for (auto& watcher : watchers_) {
    watcher.join();
  }
}

// Gloo of 2022 tells only those messages of a broken connection that have not begun: whoever waits for one that was
// half received or half sent would wait for the deadline (`Pair::signalException`), and whoever waits for another peer,
// which may itself wait for the lost one, learns nothing. So a message that never comes is awaited as well, and whoever
// waits for it wakes the exchange, whichever peer it is at.
void Group::watch(int peer, Buffer sentinel) const {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!context_) {
      return;
    }
    peers_[peer].sentinel = sentinel.get();
  }
  std::string what;
  try {
    sentinel->waitRecv(std::chrono::hours(24 * 365));
  } catch (const std::exception& error) {
    what = error.what();
  }
  std::lock_guard<std::mutex> lock(mutex_);
  peers_[peer].sentinel = nullptr;
  peers_[peer].broken = std::move(what);
  for (auto& other : peers_) {
    other.wake_exchange();
  }
}

void Group::Peer::wake_exchange() {
  if (received) {
    received->abortWaitRecv();
  }
  if (sent) {
    sent->abortWaitSend();
  }
}

void Group::Peer::wake_watcher() {
  if (sentinel) {
    sentinel->abortWaitRecv();
  }
}

// The buffers of an exchange, one for each message, as long as it lasts: a buffer of one peer alone tells whose
// connection broke. When they are gone, Gloo no longer touches the memory behind them.
struct Group::Active {
  explicit Active(const Group& group) : group(group) {
    std::lock_guard<std::mutex> lock(group.mutex_);
    context = group.context_;
    if (context) {
      received.resize(context->size);
      sent.resize(context->size);
    }
  }

  ~Active() {
    std::lock_guard<std::mutex> lock(group.mutex_);
    for (auto& peer : group.peers_) {
      peer.received = peer.sent = nullptr;
    }
  }

  void receive(int peer, void* bytes, std::size_t length) {
    add(peer, received[peer], group.peers_[peer].received, bytes, length).recv(peer, kSlot);
  }

  void send(int peer, void* bytes, std::size_t length) {
    add(peer, sent[peer], group.peers_[peer].sent, bytes, length).send(peer, kSlot);
  }

  // Waits until the messages from and to a peer have passed. False if the group was closed meanwhile.
  bool wait(int peer, Clock::time_point end) {
    while (!passed(peer, end)) {
      if (closed()) {
        return false;
      }
      // Somebody's connection broke. That matters if a message of this exchange was still under way: a peer may leave
      // after its last one.
      for (int other = 0; other < context->size; other++) {
        const std::string broken = why_broken(other);
        if (broken.empty()) {
          continue;
        }
        lost = other;
        if (!have_passed(other)) {
          throw ::gloo::IoException(broken);
        }
        lost = -1;
      }
    }
    return true;
  }

  // The peers from `first` on, in the order of waiting, whose messages have not passed.
  rust::Vec<std::uint32_t> missing(int first) {
    rust::Vec<std::uint32_t> peers;
    const int size = context->size;
    for (int peer = first; peer != context->rank; peer = (peer + 1) % size) {
      if (peer == first || !have_passed(peer)) {
        peers.push_back(static_cast<std::uint32_t>(peer));
      }
    }
    return peers;
  }

  const Group& group;
  std::shared_ptr<::gloo::rendezvous::Context> context;
  std::vector<Buffer> received;
  std::vector<Buffer> sent;
  // The peer whose broken connection ended the exchange, if it was another than the one that was waited for.
  int lost = -1;

 private:
  ::gloo::transport::UnboundBuffer& add(int peer, Buffer& place, ::gloo::transport::UnboundBuffer*& known,
                                        void* bytes, std::size_t length) {
    std::lock_guard<std::mutex> lock(group.mutex_);
    place = context->createUnboundBuffer(bytes, length);
    known = place.get();
    if (!group.context_) {
      group.peers_[peer].wake_exchange();
    }
    return *place;
  }

  bool closed() const {
    std::lock_guard<std::mutex> lock(group.mutex_);
    return !group.context_;
  }

  std::string why_broken(int peer) const {
    std::lock_guard<std::mutex> lock(group.mutex_);
    return group.peers_[peer].broken;
  }

  // Whether both messages have passed; false if the wait for one was ended from outside. One that has passed is not
  // waited for again.
  bool passed(int peer, Clock::time_point end) {
    if (received[peer] && !received[peer]->waitRecv(left(end))) {
      return false;
    }
    forget(received[peer], group.peers_[peer].received);
    if (sent[peer] && !sent[peer]->waitSend(left(end))) {
      return false;
    }
    forget(sent[peer], group.peers_[peer].sent);
    return true;
  }

  // Whether both messages have passed by now.
  bool have_passed(int peer) {
    try {
      // A call to end a wait that nobody was in ends the next one: there may be one for each message.
      return passed(peer, Clock::now()) || passed(peer, Clock::now()) || passed(peer, Clock::now());
    } catch (const std::exception&) {
      return false;
    }
  }

  void forget(Buffer& place, ::gloo::transport::UnboundBuffer*& known) {
    {
      std::lock_guard<std::mutex> lock(group.mutex_);
      known = nullptr;
    }
    place.reset();
  }
};

Outcome Group::exchange(rust::Slice<const std::uint8_t> mine, std::size_t stride,
                        rust::Slice<std::uint8_t> theirs, std::int32_t root,
                        std::uint64_t milliseconds) const {
  const auto end = Clock::now() + Milliseconds(milliseconds);
  Active active(*this);
  if (!active.context) {
    return outcome(Kind::Closed);
  }
  const int rank = active.context->rank;
  const int size = active.context->size;
  const std::size_t length = theirs.size() / (root < 0 ? size : 1);
  const auto into = [&](int i) { return theirs.data() + (root < 0 ? i * length : 0); };
  // Gloo takes no constant bytes, and only reads those that it sends.
  const auto from = [&](int i) { return const_cast<std::uint8_t*>(mine.data()) + i * stride; };
  int peer = rank;
  try {
    // Each begins with its neighbour, so that they do not all turn to the same rank.
    for (int step = 1; step < size; step++) {
      peer = (rank + size - step) % size;
      if (root < 0 || root == peer) {
        active.receive(peer, into(peer), length);
      }
    }
    for (int step = 1; step < size; step++) {
      peer = (rank + step) % size;
      if (root < 0 || root == rank) {
        active.send(peer, from(peer), length);
      }
    }
    if (root < 0 || root == rank) {
      std::memcpy(into(rank), from(rank), length);
    }
    for (int step = 1; step < size; step++) {
      peer = (rank + step) % size;
      if (!active.wait(peer, end)) {
        return outcome(Kind::Closed);
      }
    }
    return outcome(Kind::Done);
  } catch (const ::gloo::IoException& error) {
    if (left(end) == Milliseconds(0)) {
      return Outcome{Kind::Late, active.missing(peer), rust::String()};
    }
    return outcome(Kind::Lost, active.lost < 0 ? peer : active.lost, error.what());
  } catch (const std::exception& error) {
    return outcome(Kind::Lost, peer, error.what());
  }
}

void Group::close() const {
  std::shared_ptr<::gloo::rendezvous::Context> last;
  std::lock_guard<std::mutex> lock(mutex_);
  for (auto& peer : peers_) {
    peer.wake_exchange();
    peer.wake_watcher();
  }
  last = std::move(context_);
  context_.reset();
}

}  // namespace incipit
