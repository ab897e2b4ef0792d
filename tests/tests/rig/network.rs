//! Machines of a network on this one: a namespace each, with a link to a bridge. The bridge, and the test itself, are in a namespace of their
//! own, so that no address is one of this machine's, and nothing gets out. Needs root, and `ip` of iproute2.

use std::net::Ipv4Addr;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::skipped;

/// Where the test stands.
pub(crate) enum Around {
    /// In the network.
    Within(Network),
    /// It was run in a network, and is done.
    Done,
    /// There is none to be had.
    Without,
}

/// A bridge, and the machines whose links go there. All is taken down with this.
pub(crate) struct Network {
    machines: Vec<String>,
}

/// Says to a test that it is in the network, and what the names of namespaces begin with.
const INSIDE: &str = "INCIPIT_TEST_NETWORK";
const BRIDGE: &str = "bridge";

impl Network {
    /// Runs a test of this file again, in a network. To be called by the test first of all.
    pub(crate) fn around(test: &str) -> Result<Around> {
        if std::env::var_os(INSIDE).is_some() {
            return Self::begin().map(Around::Within);
        }
        if !rustix::process::geteuid().is_root() || Command::new("ip").arg("-V").output().is_err() {
            skipped::<()>("network namespaces need root and the program ip (the package iproute2)")?;
            return Ok(Around::Without);
        }
        let name = format!("incipit-{}", std::process::id());
        if let Err(error) = ip(&["netns", "add", &name]) {
            skipped::<()>(&format!("this system lets nobody make networks: {error}"))?;
            return Ok(Around::Without);
        }
        let mut within = Command::new("ip");
        within.args(["netns", "exec", &name]).arg(std::env::current_exe()?);
        let ran =
            within.args(["--exact", test, "--include-ignored", "--nocapture"]).env(INSIDE, &name).status();
        let _ = ip(&["netns", "del", &name]);
        ensure!(ran?.success(), "it failed within the network; see above");
        Ok(Around::Done)
    }

    fn begin() -> Result<Self> {
        ip(&["link", "set", "lo", "up"])?;
        ip(&["link", "add", BRIDGE, "type", "bridge"])?;
        let network = Self { machines: Vec::new() };
        ip(&["addr", "add", &format!("{}/24", network.address()), "dev", BRIDGE])?;
        ip(&["link", "set", BRIDGE, "up"])?;
        Ok(network)
    }

    /// The address of this machine, which is none of the network's.
    pub(crate) fn address(&self) -> Ipv4Addr {
        self.at(1)
    }

    fn at(&self, place: u8) -> Ipv4Addr {
        Ipv4Addr::new(10, 0, 0, place)
    }

    fn namespace(&self, machine: &str) -> String {
        format!("{}-{machine}", std::env::var(INSIDE).unwrap_or_default())
    }

    /// The end of a machine's link that is on the bridge.
    fn link(&self, machine: &str) -> Result<String> {
        let place = self.machines.iter().position(|known| known == machine);
        Ok(format!("link{}", place.with_context(|| format!("{machine} is on the network"))?))
    }

    /// A program on a machine, which is made when it is first named.
    pub(crate) fn command(&mut self, machine: &str, program: &Command) -> Result<Command> {
        if !self.machines.iter().any(|known| known == machine) {
            self.add(machine)?;
        }
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.namespace(machine)]).arg(program.get_program());
        command.args(program.get_args());
        for (name, value) in program.get_envs() {
            match value {
                Some(value) => command.env(name, value),
                None => command.env_remove(name),
            };
        }
        Ok(command)
    }

    fn add(&mut self, machine: &str) -> Result<()> {
        let namespace = self.namespace(machine);
        self.machines.push(machine.to_owned());
        let place = u8::try_from(self.machines.len() + 1)?;
        let (link, address) = (self.link(machine)?, format!("{}/24", self.at(place)));
        ip(&["netns", "add", &namespace])?;
        ip(&["link", "add", &link, "type", "veth", "peer", "name", "eth0", "netns", &namespace])?;
        ip(&["link", "set", &link, "master", BRIDGE, "up"])?;
        ip(&["-n", &namespace, "addr", "add", &address, "dev", "eth0"])?;
        ip(&["-n", &namespace, "link", "set", "eth0", "up"])?;
        ip(&["-n", &namespace, "link", "set", "lo", "up"])
    }

    /// Cuts a machine off, or joins it again.
    pub(crate) fn set_link(&self, machine: &str, up: bool) -> Result<()> {
        ip(&["link", "set", &self.link(machine)?, if up { "up" } else { "down" }])
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for machine in &self.machines {
            let _ = ip(&["netns", "del", &self.namespace(machine)]);
        }
    }
}

fn ip(args: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(args).output().context("ip")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {}: {}", args.join(" "), said.trim());
    Ok(())
}
