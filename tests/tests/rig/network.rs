//! Machines of a network on this one: a namespace each, with a link to a bridge. Needs root, and `ip` of iproute2.

use std::net::Ipv4Addr;
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::skipped;

/// A bridge, and the machines whose links go there. All is taken down with this.
pub(crate) struct Network {
    /// Its number: this machine has 10.N.N'.1 on it, where N.N' is the number.
    number: u16,
    machines: Vec<String>,
}

impl Network {
    /// Nothing, with a word about it, where it cannot be had.
    pub(crate) fn start() -> Result<Option<Self>> {
        if !rustix::process::geteuid().is_root() || Command::new("ip").arg("-V").output().is_err() {
            return skipped("network namespaces need root and the program ip (the package iproute2)");
        }
        // Tests that run beside each other have other numbers; 10.0 and 10.1 are left to whoever has them.
        let number = (std::process::id() % 0xfd00) as u16 + 0x200;
        let network = Self { number, machines: Vec::new() };
        let bridge = network.bridge();
        if let Err(error) = ip(&["link", "add", &bridge, "type", "bridge"]) {
            return skipped(&format!("this system lets nobody make networks: {error}"));
        }
        ip(&["addr", "add", &format!("{}/24", network.address()), "dev", &bridge])?;
        ip(&["link", "set", &bridge, "up"])?;
        Ok(Some(network))
    }

    /// The address of this machine, which is none of the network's.
    pub(crate) fn address(&self) -> Ipv4Addr {
        self.at(1)
    }

    fn at(&self, place: u8) -> Ipv4Addr {
        let [high, low] = self.number.to_be_bytes();
        Ipv4Addr::new(10, high, low, place)
    }

    fn bridge(&self) -> String {
        format!("inc{}", self.number)
    }

    fn namespace(&self, machine: &str) -> String {
        format!("inc{}-{machine}", self.number)
    }

    /// The end of a machine's link that is on the bridge.
    fn link(&self, machine: &str) -> Result<String> {
        let place = self.machines.iter().position(|known| known == machine);
        Ok(format!("inc{}p{}", self.number, place.with_context(|| format!("{machine} is on the network"))?))
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
        ip(&["link", "set", &link, "master", &self.bridge(), "up"])?;
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
        let _ = ip(&["link", "del", &self.bridge()]);
    }
}

fn ip(args: &[&str]) -> Result<()> {
    let output = Command::new("ip").args(args).output().context("ip")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "ip {}: {}", args.join(" "), said.trim());
    Ok(())
}
