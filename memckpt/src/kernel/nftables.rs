//! Dropping the packets of connections: a table of nf_tables (include/uapi/linux/netfilter/nf_tables.h).

use std::io;
use std::net::{IpAddr, SocketAddr};

use nix::sys::socket::SockProtocol;

use super::SyscallError;
use super::netlink::{self, Netlink, attribute, nested};

/// include/uapi/linux/netfilter/nfnetlink.h
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFNL_MSG_BATCH_BEGIN: u16 = 16;
const NFNL_MSG_BATCH_END: u16 = 17;
/// include/uapi/linux/netfilter.h
const NFPROTO_INET: u8 = 1;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
const NF_INET_LOCAL_IN: u32 = 1;
const NF_INET_LOCAL_OUT: u32 = 3;
const NF_DROP: u32 = 0;
/// enum nf_tables_msg_types
const NEWTABLE: u16 = 0;
const DELTABLE: u16 = 2;
const NEWCHAIN: u16 = 3;
const NEWRULE: u16 = 6;
/// The table goes with the socket that made it: Linux 5.12.
const NFT_TABLE_F_OWNER: u32 = 2;
/// enum nft_registers
const VERDICT: u32 = 0;
const FIRST: u32 = 1;
/// enum nft_meta_keys
const META_NFPROTO: u32 = 15;
const META_L4PROTO: u32 = 16;
/// enum nft_payload_bases
const NETWORK_HEADER: u32 = 1;
const TRANSPORT_HEADER: u32 = 2;
/// The names of our chains.
const INPUT: &str = "input";
const OUTPUT: &str = "output";
/// Most bytes of a batch: below the send buffer of a socket, net.core.wmem_default.
const BATCH: usize = 1 << 16;

/// A TCP connection, from one of its ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// This end.
    pub local: SocketAddr,
    /// The other.
    pub remote: SocketAddr,
}

/// A table that drops all packets of some connections, in our network namespace. The kernel removes it when this is dropped,
/// or we die.
#[derive(Debug)]
pub struct Block(#[expect(dead_code, reason = "the table lives as long as the socket")] Netlink);

impl Block {
    /// Drops every packet of `connections`, both ways, from now on: a table `name` of family inet. Minimum kernel: 5.12.
    ///
    /// # Errors
    /// No nf_tables in this kernel, no CAP_NET_ADMIN, or there is such a table.
    pub fn new(name: &str, connections: &[Connection]) -> Result<Self, SyscallError> {
        let netlink = open(name)?;
        add(&netlink, name, NFT_TABLE_F_OWNER, connections)?;
        Ok(Self(netlink))
    }
}

/// As [`Block::new`], until somebody deletes the table.
///
/// # Errors
/// As there.
pub fn block_for_good(name: &str, connections: &[Connection]) -> Result<(), SyscallError> {
    add(&open(name)?, name, 0, connections)
}

/// Deletes table `name` of family inet.
///
/// # Errors
/// ENOENT: there is none.
pub fn unblock(name: &str) -> Result<(), SyscallError> {
    let mut transaction = Transaction::new();
    transaction.push(DELTABLE, 0, &[attribute(1, &text(name))]);
    transaction.commit(&open(name)?, name)
}

fn open(name: &str) -> Result<Netlink, SyscallError> {
    Netlink::open(SockProtocol::NetlinkNetFilter)
        .map_err(|e| SyscallError::new("socket(NETLINK_NETFILTER)", object(name), e))
}

fn object(name: &str) -> String {
    format!("nf_tables table inet {name}")
}

fn add(netlink: &Netlink, name: &str, flags: u32, connections: &[Connection]) -> Result<(), SyscallError> {
    let table = attribute(1, &text(name));
    let mut transaction = Transaction::new();
    let create = libc::NLM_F_CREATE | if flags == 0 { 0 } else { libc::NLM_F_EXCL };
    transaction.push(NEWTABLE, create, &[table.clone(), attribute(2, &flags.to_be_bytes())]);
    for (chain, hook) in [(INPUT, NF_INET_LOCAL_IN), (OUTPUT, NF_INET_LOCAL_OUT)] {
        // NFTA_HOOK_HOOKNUM, and the priority of filters.
        let hook = nested(4, &[attribute(1, &hook.to_be_bytes()), attribute(2, &0_u32.to_be_bytes())]);
        let chain = [table.clone(), attribute(3, &text(chain)), hook, attribute(7, &text("filter"))];
        transaction.push(NEWCHAIN, libc::NLM_F_CREATE, &chain);
    }
    for connection in connections {
        let Connection { local, remote } = *connection;
        for (chain, from, to) in [(INPUT, remote, local), (OUTPUT, local, remote)] {
            let rule = [table.clone(), attribute(2, &text(chain)), nested(4, &dropping(from, to))];
            transaction.push(NEWRULE, libc::NLM_F_CREATE | libc::NLM_F_APPEND, &rule);
        }
        if transaction.messages.len() > BATCH {
            std::mem::replace(&mut transaction, Transaction::new()).commit(netlink, name)?;
        }
    }
    transaction.commit(netlink, name)
}

/// A string of nf_tables.
fn text(text: &str) -> Vec<u8> {
    [text.as_bytes(), &[0]].concat()
}

/// The expressions that drop what TCP sends from `from` to `to`.
fn dropping(from: SocketAddr, to: SocketAddr) -> Vec<Vec<u8>> {
    let (family, addresses, width) = match (from.ip().to_canonical(), to.ip().to_canonical()) {
        // Where the addresses are: struct iphdr, struct ipv6hdr.
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            (NFPROTO_IPV4, vec![(12, from.octets().to_vec()), (16, to.octets().to_vec())], 4)
        }
        (from, to) => {
            let octets = |ip: IpAddr| match ip {
                IpAddr::V4(ip) => ip.to_ipv6_mapped().octets().to_vec(),
                IpAddr::V6(ip) => ip.octets().to_vec(),
            };
            (NFPROTO_IPV6, vec![(8, octets(from)), (24, octets(to))], 16)
        }
    };
    let mut expressions = vec![meta(META_NFPROTO), equals(&[family])];
    expressions.extend([meta(META_L4PROTO), equals(&[libc::IPPROTO_TCP as u8])]);
    for (at, address) in addresses {
        expressions.extend([payload(NETWORK_HEADER, at, width), equals(&address)]);
    }
    let ports = [from.port().to_be_bytes(), to.port().to_be_bytes()].concat();
    expressions.extend([payload(TRANSPORT_HEADER, 0, 4), equals(&ports)]);
    // NFTA_IMMEDIATE_DATA, NFTA_DATA_VERDICT, NFTA_VERDICT_CODE
    let verdict = nested(2, &[nested(2, &[attribute(1, &NF_DROP.to_be_bytes())])]);
    expressions.push(expression("immediate", &[attribute(1, &VERDICT.to_be_bytes()), verdict]));
    expressions
}

/// NFTA_LIST_ELEM of NFTA_EXPR_NAME and NFTA_EXPR_DATA.
fn expression(name: &str, data: &[Vec<u8>]) -> Vec<u8> {
    nested(1, &[attribute(1, &text(name)), nested(2, data)])
}

/// Loads what is known of the packet.
fn meta(key: u32) -> Vec<u8> {
    expression("meta", &[attribute(1, &FIRST.to_be_bytes()), attribute(2, &key.to_be_bytes())])
}

/// Loads a part of the packet.
fn payload(base: u32, offset: u32, len: u32) -> Vec<u8> {
    let words = [FIRST, base, offset, len];
    let attributes: Vec<Vec<u8>> =
        (1..).zip(words).map(|(kind, word)| attribute(kind, &word.to_be_bytes())).collect();
    expression("payload", &attributes)
}

/// Goes on only if what was loaded is `value`.
fn equals(value: &[u8]) -> Vec<u8> {
    /// enum nft_cmp_ops
    const EQ: u32 = 0;
    // NFTA_CMP_DATA of NFTA_DATA_VALUE.
    let data = nested(3, &[attribute(1, value)]);
    expression("cmp", &[attribute(1, &FIRST.to_be_bytes()), attribute(2, &EQ.to_be_bytes()), data])
}

/// Messages that take effect together.
struct Transaction {
    messages: Vec<u8>,
    /// Where the last message begins.
    last: usize,
    sequence: u32,
}

impl Transaction {
    fn new() -> Self {
        let mut new = Self { messages: Vec::new(), last: 0, sequence: 0 };
        new.frame(NFNL_MSG_BATCH_BEGIN);
        new
    }

    /// struct nfgenmsg: any family, version 0, for whom the batch is.
    fn frame(&mut self, kind: u16) {
        let [high, low] = NFNL_SUBSYS_NFTABLES.to_be_bytes();
        self.messages.extend(netlink::message(kind, 0, self.sequence, &[&[0, 0, high, low]]));
    }

    fn push(&mut self, kind: u16, flags: i32, attributes: &[Vec<u8>]) {
        self.sequence += 1;
        self.last = self.messages.len();
        let kind = NFNL_SUBSYS_NFTABLES << 8 | kind;
        let parts = [&[NFPROTO_INET, 0, 0, 0], &*attributes.concat()];
        self.messages.extend(netlink::message(kind, flags, self.sequence, &parts));
    }

    fn commit(mut self, netlink: &Netlink, name: &str) -> Result<(), SyscallError> {
        // The last message is acknowledged; others are answered only if they fail, and before it.
        const FLAGS: usize = 6;
        if self.sequence == 0 {
            return Ok(());
        }
        self.messages[self.last + FLAGS] |= libc::NLM_F_ACK as u8;
        self.frame(NFNL_MSG_BATCH_END);
        netlink.send(&self.messages).map_err(|e| SyscallError::new("sendto", object(name), e))?;
        loop {
            let answer = netlink.receive(8192).map_err(|e| SyscallError::new("recv", object(name), e))?;
            match netlink::error(&answer) {
                Some(0) => return Ok(()),
                Some(errno) => {
                    let error = io::Error::from_raw_os_error(errno);
                    return Err(SyscallError::new("nf_tables", object(name), error));
                }
                None => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read as _, Write as _};
    use std::net::{TcpListener, TcpStream};
    use std::time::Duration;

    use super::*;

    /// Both ends of a connection, and how memckpt would name it.
    fn connected(address: &str) -> (TcpStream, TcpStream, Connection) {
        let listener = TcpListener::bind(address).unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let server = listener.accept().unwrap().0;
        server.set_read_timeout(Some(Duration::from_millis(150))).unwrap();
        let connection =
            Connection { local: server.local_addr().unwrap(), remote: server.peer_addr().unwrap() };
        (client, server, connection)
    }

    fn arrives(client: &mut TcpStream, server: &mut TcpStream) -> bool {
        client.write_all(b"x").unwrap();
        server.read(&mut [0; 100]).is_ok()
    }

    #[test]
    fn only_the_named_connection_is_blocked_and_only_as_long_as_wanted() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let (mut client, mut server, connection) = connected(address);
            let (mut other_client, mut other_server, _) = connected(address);
            let name = format!("memckpt-test-{}-{}", std::process::id(), connection.local.port());
            let block = Block::new(&name, &[connection]).unwrap();
            assert!(!arrives(&mut client, &mut server), "{address}: blocked");
            assert!(arrives(&mut other_client, &mut other_server), "{address}: another connection");
            // It is its owner's alone.
            assert_eq!(Block::new(&name, &[]).unwrap_err().errno(), Some(libc::EPERM));
            drop(block);
            server.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
            assert!(arrives(&mut client, &mut server), "{address}: sent again");

            block_for_good(&name, &[connection]).unwrap();
            server.set_read_timeout(Some(Duration::from_millis(150))).unwrap();
            while server.read(&mut [0; 100]).is_ok() {}
            assert!(!arrives(&mut client, &mut server), "{address}: blocked for good");
            unblock(&name).unwrap();
            assert_eq!(unblock(&name).unwrap_err().errno(), Some(libc::ENOENT));
        }
    }

    #[test]
    fn more_connections_than_one_batch_holds() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let connection = |port: u16| Connection {
            local: SocketAddr::from(([192, 0, 2, 1], port)),
            remote: SocketAddr::from(([192, 0, 2, 2], port)),
        };
        let many: Vec<Connection> = (1..=1000).map(connection).collect();
        Block::new(&format!("memckpt-test-many-{}", std::process::id()), &many).unwrap();
    }
}
