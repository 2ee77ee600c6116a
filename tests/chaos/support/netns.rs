//! A memcached in a network namespace of its own, at the end of a virtual cable that can be cut, jammed and narrowed.
//!
//! The test stays where it is, and reaches the node through the cable: no other traffic of the machine is touched. It
//! needs root, or a sudo that does not ask, and `ip`, `nft` and `tc`.

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::time::Instant;

use super::raw;
use super::{PATIENCE, switched_off as is_off};

const SWITCH: &str = "CHAOS_NETNS";
const PORT: u16 = 11211;
/// Of the names of namespaces; the process that made them follows.
const PREFIX: &str = "memcached-chaos-";

/// Whether the user has switched these tests off.
pub(crate) fn switched_off() -> bool {
    is_off(SWITCH)
}

/// The namespace, the cable and the memcached; all gone when this is dropped.
#[derive(Debug)]
pub(crate) struct FarNode {
    namespace: String,
    outer: String,
    inner: String,
    address: String,
}

/// Which packets.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Packets {
    /// From the client to memcached.
    Requests,
    /// From memcached to the client.
    Replies,
}

impl FarNode {
    /// Lays the cable and starts memcached at its end.
    pub(crate) async fn start() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        remove_leftovers();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let process = std::process::id();
        // A network of four addresses that is unlikely to be anybody else's.
        let (a, b) = (fastrand::u8(64..128), fastrand::u8(..));
        let c = fastrand::u8(..64) * 4;
        let address = format!("10.{a}.{b}.{}", c + 2);
        let name = format!("{process}-{number}");
        let node = Self {
            namespace: format!("{PREFIX}{name}"),
            outer: outer(&name),
            inner: format!("ch{name}i"),
            address: format!("{address}:{PORT}"),
        };
        let Self {
            namespace,
            outer,
            inner,
            ..
        } = &node;
        run(&format!("ip netns add {namespace}"));
        run(&format!(
            "ip link add {outer} type veth peer name {inner} netns {namespace}"
        ));
        run(&format!("ip addr add 10.{a}.{b}.{}/30 dev {outer}", c + 1));
        run(&format!("ip link set {outer} up"));
        run(&format!(
            "ip -n {namespace} addr add {address}/30 dev {inner}"
        ));
        run(&format!("ip -n {namespace} link set {inner} up"));
        run(&format!("ip -n {namespace} link set lo up"));
        let binary = std::env::var("MEMCACHED").unwrap_or_else(|_| "memcached".into());
        run(&format!(
            "ip netns exec {namespace} {binary} -d -u root -U 0 -l {address} -p {PORT}"
        ));
        let until = Instant::now() + PATIENCE;
        while !raw::answers_within(&node.address, Duration::from_secs(1)).await {
            assert!(
                Instant::now() < until,
                "memcached does not start in {namespace}"
            );
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        node
    }

    /// `host:port`, as the client is to be told.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Applies a rule of nftables to packets on memcached's side of the cable, such as `drop`.
    pub(crate) fn rule(&self, packets: Packets, rule: &str) {
        let (hook, port) = match packets {
            Packets::Requests => ("input", "dport"),
            Packets::Replies => ("output", "sport"),
        };
        let rules = format!(
            "table inet chaos {{\n chain {hook} {{\n type filter hook {hook} priority 0;\n tcp {port} {PORT} {rule};\n }}\n}}\n"
        );
        let namespace = &self.namespace;
        run_with(&format!("ip netns exec {namespace} nft -f -"), &rules);
    }

    /// Drops everything in both directions, without a word.
    pub(crate) fn black_hole(&self) {
        self.rule(Packets::Requests, "drop");
        self.rule(Packets::Replies, "drop");
    }

    /// Loses so many packets of a hundred, in both directions.
    pub(crate) fn lose(&self, percent: u32) {
        let rule = format!("numgen random mod 100 < {percent} drop");
        self.rule(Packets::Requests, &rule);
        self.rule(Packets::Replies, &rule);
    }

    /// Lets memcached send only so much: a rate as `tc` takes it.
    pub(crate) fn narrow(&self, rate: &str) {
        let Self {
            namespace, inner, ..
        } = self;
        run(&format!(
            "ip netns exec {namespace} tc qdisc replace dev {inner} root tbf rate {rate} burst 10kb latency 400ms"
        ));
    }

    /// Memcached's end of the cable goes down.
    pub(crate) fn interface_down(&self) {
        run(&format!(
            "ip -n {} link set {} down",
            self.namespace, self.inner
        ));
    }

    /// Takes everything back.
    pub(crate) fn heal(&self) {
        let Self {
            namespace, inner, ..
        } = self;
        run(&format!("ip -n {namespace} link set {inner} up"));
        run(&format!("ip netns exec {namespace} nft flush ruleset"));
        // There may be none.
        let _ = attempt(
            &format!("ip netns exec {namespace} tc qdisc del dev {inner} root"),
            "",
        );
    }
}

impl Drop for FarNode {
    fn drop(&mut self) {
        remove(&self.namespace);
    }
}

/// This side's end of the cable.
fn outer(name: &str) -> String {
    format!("ch{name}o")
}

/// Removes a namespace with all that is in it, and the cable.
fn remove(namespace: &str) {
    // It would go with the namespace, but that lives on until its last socket has given up.
    if let Some(name) = namespace.strip_prefix(PREFIX) {
        let _ = attempt(&format!("ip link del {}", outer(name)), "");
    }
    if let Ok(inside) = attempt(&format!("ip netns pids {namespace}"), "") {
        for process in String::from_utf8_lossy(&inside.stdout).split_whitespace() {
            let _ = attempt(&format!("kill -KILL {process}"), "");
        }
    }
    let _ = attempt(&format!("ip netns del {namespace}"), "");
}

/// Removes what tests left behind that were killed before they could clean up.
fn remove_leftovers() {
    let Ok(listed) = attempt("ip netns list", "") else {
        return;
    };
    for line in String::from_utf8_lossy(&listed.stdout).lines() {
        let name = line.split_whitespace().next().unwrap_or_default();
        let process = name
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.split('-').next())
            .and_then(|process| process.parse::<u32>().ok());
        if process.is_some_and(|process| !Path::new(&format!("/proc/{process}")).exists()) {
            remove(name);
        }
    }
}

fn run(command: &str) {
    run_with(command, "");
}

fn run_with(command: &str, input: &str) {
    if let Err(error) = attempt(command, input) {
        panic!(
            "`{command}`: {error}. These tests make network namespaces: they need root or a sudo that does not ask, and the \
             packages iproute2 and nftables. {SWITCH}=off switches them off."
        );
    }
}

/// Runs a command as root.
fn attempt(command: &str, input: &str) -> Result<Output, String> {
    let mut words = command.split(' ');
    let mut runs = if nix::unistd::geteuid().is_root() {
        Command::new(words.next().unwrap())
    } else {
        let mut sudo = Command::new("sudo");
        sudo.arg("-n");
        sudo
    };
    let mut process = runs
        .args(words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| error.to_string())?;
    let mut stdin = process.stdin.take().unwrap();
    stdin
        .write_all(input.as_bytes())
        .map_err(|error| error.to_string())?;
    drop(stdin);
    let output = process
        .wait_with_output()
        .map_err(|error| error.to_string())?;
    if output.status.success() {
        return Ok(output);
    }
    Err(format!(
        "{}: {}",
        output.status,
        String::from_utf8_lossy(&output.stderr).trim()
    ))
}
