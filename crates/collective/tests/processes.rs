//! Ranks that are processes, connected by Gloo. A program of its own: a process that is started would inherit the
//! connections of ranks that are threads beside it, and keep them open.
#![cfg(feature = "gloo")]
#![allow(clippy::unwrap_used, reason = "a helper that fails is a test that fails")]

mod suite;

use std::process::{Command, Stdio};

use incipit_collective::store::{TcpServer, open};
use incipit_collective::{Mesh, gloo};
use suite::{CHECKS, MARK, RANK};

/// One rank of a check, in a process that the test below started: "rank check tp dp store".
fn be_a_rank(words: &str) {
    let [rank, check, tp, dp, store] = words.split(' ').collect::<Vec<_>>()[..] else { panic!("{words}") };
    let number = |word: &str| word.parse::<usize>().unwrap();
    let (check, mesh) = (&CHECKS[number(check)], Mesh::new(number(tp), number(dp), number(tp) * number(dp)));
    let ranks = gloo::connect(mesh.unwrap(), number(rank), open(store).unwrap(), &suite::options(check));
    println!("\n{MARK}{}", (check.body)(ranks.unwrap()));
}

#[test]
fn every_check_holds_between_processes() {
    if let Ok(words) = std::env::var(RANK) {
        return be_a_rank(&words);
    }
    let folder = tempfile::tempdir().unwrap();
    for (c, check) in CHECKS.iter().enumerate() {
        for (m, (tp, dp)) in check.meshes.iter().enumerate() {
            println!("{} on {tp} x {dp}", check.name);
            let mesh = Mesh::new(*tp, *dp, tp * dp).unwrap();
            let server = TcpServer::new("[::1]:0").or_else(|_| TcpServer::new("127.0.0.1:0")).unwrap();
            let store = match c % 2 {
                0 => format!("tcp://{}", server.address()),
                _ => format!("file:{}/{c}-{m}", folder.path().display()),
            };
            let seen = suite::at_once((0..mesh.world()).collect(), |rank: usize| {
                let words = format!("{rank} {c} {tp} {dp} {store}");
                let mut command = Command::new(std::env::current_exe().unwrap());
                command.args(["--exact", "every_check_holds_between_processes", "--nocapture"]);
                if c % 3 == 0 {
                    command.env("GLOO_SOCKET_IFNAME", "lo");
                }
                let output = command.env(RANK, words).stderr(Stdio::inherit()).output().unwrap();
                let text = String::from_utf8(output.stdout).unwrap();
                let result = text.lines().find_map(|line| line.strip_prefix(MARK));
                result.unwrap_or_else(|| panic!("rank {rank} of {}: {text}", check.name)).to_owned()
            });
            assert_eq!(seen, suite::locally(check, mesh), "{}", check.name);
        }
    }
}
