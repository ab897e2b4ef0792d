//! Ranks whose store is far away, as that of engines, which the coordinator keeps: what it says takes long, or does not come.

use std::sync::atomic::AtomicBool;

use super::*;

/// A store of which each question takes long, but for what has been brought here.
struct Distant {
    store: Arc<dyn Store>,
    waited: AtomicUsize,
    /// Whether nothing more is brought.
    cut_off: AtomicBool,
    brought: std::sync::Mutex<std::collections::BTreeMap<String, Option<Vec<u8>>>>,
}

impl Store for Distant {
    fn set(&self, key: &str, value: &[u8]) -> Result<()> {
        self.store.set(key, value)
    }

    fn get(&self, key: &str, deadline: Duration) -> Result<Vec<u8>> {
        self.store.get(key, deadline)
    }

    fn try_get(&self, key: &str) -> Result<Option<Vec<u8>>> {
        self.waited.fetch_add(1, Ordering::SeqCst);
        thread::sleep(Duration::from_millis(100));
        self.store.try_get(key)
    }

    fn last_known(&self, key: &str) -> Result<Option<Vec<u8>>> {
        let mut brought = self.brought.lock().unwrap();
        if !self.cut_off.load(Ordering::SeqCst) {
            brought.insert(key.to_owned(), self.store.try_get(key)?);
        }
        Ok(brought.get(key).cloned().flatten())
    }
}

/// Runs `body` for both ranks of a data group, with the store of each.
fn both<R: Send>(body: impl Fn(&Ranks, &Distant) -> R + Sync) -> Vec<R> {
    let (server, net) = (TcpServer::new("127.0.0.1:0").unwrap(), Arc::new(Net::default()));
    let (mesh, options) = (Mesh::new(1, 2, 2).unwrap(), Options::default());
    let done = Gathering::of(2);
    at_once(vec![0, 1], |rank| {
        let store = Arc::new(Distant {
            store: client(&server),
            waited: AtomicUsize::default(),
            cut_off: AtomicBool::default(),
            brought: std::sync::Mutex::default(),
        });
        let meeting = Meeting { store: store.clone(), ..meeting(mesh, rank, &server, &options) };
        let ranks = connect_over(&Fakes { net: net.clone(), rank }, &meeting).unwrap();
        let result = body(&ranks, &store);
        done.wait();
        result
    })
}

#[test]
fn operations_wait_for_no_answer_of_the_store() {
    both(|ranks, store| {
        let before = store.waited.load(Ordering::SeqCst);
        for _ in 0..40 {
            ranks.data().barrier().unwrap();
            // Long enough for a rank to look time and again whether its group still is.
            thread::sleep(Duration::from_millis(10));
        }
        assert_eq!(store.waited.load(Ordering::SeqCst), before);
    });
}

#[test]
fn a_rank_that_waits_longer_than_silence_gives_nobody_up_while_the_store_is_cut_off() {
    both(|ranks, store| {
        let late = |time| (ranks.rank() == 0).then(|| thread::sleep(time));
        // So long that the other looks for it, and knows of it.
        late(Duration::from_millis(800));
        ranks.data().barrier().unwrap();
        assert!(ranks.rank() == 0 || store.brought.lock().unwrap().contains_key("epoch/0/note/0"));
        thread::scope(|scope| {
            scope.spawn(|| {
                store.cut_off.store(ranks.rank() == 1, Ordering::SeqCst);
                thread::sleep(notes::SILENCE + Duration::from_secs(2));
                store.cut_off.store(false, Ordering::SeqCst);
            });
            late(notes::SILENCE + Duration::from_secs(4));
            ranks.data().barrier().unwrap();
        });
    });
}
