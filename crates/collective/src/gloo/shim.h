// Gloo's TCP transport as Rust sees it: a group of ranks that exchange bytes.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "rust/cxx.h"

namespace gloo {
namespace rendezvous {
class Context;
}
namespace transport {
class Device;
class UnboundBuffer;
}
}  // namespace gloo

namespace incipit {

struct Bridge;
struct Outcome;

// A rank's network interface, and the thread that serves it.
class Port {
 public:
  explicit Port(std::shared_ptr<::gloo::transport::Device> device);
  ~Port();
  std::shared_ptr<::gloo::transport::Device> device;
};

// Connections to all other ranks of a group. `exchange` is called by one thread at a time, `close` by any.
class Group {
 public:
  explicit Group(std::shared_ptr<::gloo::rendezvous::Context> context);
  ~Group();

  // Begins to watch the connections.
  void start();

  // Sends as many bytes to each rank i, from `i * stride` of `mine` on, as it receives from each into its part of
  // `theirs`, by rank. With a root that is not negative only that rank sends, and `theirs` takes what it sends.
  Outcome exchange(rust::Slice<const std::uint8_t> mine, std::size_t stride, rust::Slice<std::uint8_t> theirs,
                   std::int32_t root, std::uint64_t milliseconds) const;

  // Closes the connections, and ends an exchange that another thread is in.
  void close() const;

 private:
  using Buffer = std::unique_ptr<::gloo::transport::UnboundBuffer>;
  struct Active;

  // What concerns one other rank.
  struct Peer {
    // Its messages of the exchange that is under way.
    ::gloo::transport::UnboundBuffer* received = nullptr;
    ::gloo::transport::UnboundBuffer* sent = nullptr;
    // What its watcher waits for.
    ::gloo::transport::UnboundBuffer* sentinel = nullptr;
    // Where the message would go that the watcher waits for, and that nobody sends.
    char never = 0;
    // Why its connection broke, once it did.
    std::string broken;

    void wake_exchange();
    void wake_watcher();
  };

  void watch(int peer, Buffer sentinel) const;

  mutable std::mutex mutex_;
  mutable std::shared_ptr<::gloo::rendezvous::Context> context_;  // none once it is closed
  mutable std::vector<Peer> peers_;
  std::vector<std::thread> watchers_;
};

std::unique_ptr<Port> open_port(rust::Str interface, rust::Str host);
std::unique_ptr<Group> connect(const Port& port, std::uint32_t rank, std::uint32_t size,
                               std::uint64_t milliseconds, const Bridge& store);

}  // namespace incipit
