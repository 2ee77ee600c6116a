//! What the client writes is what the server reads: every operation the client can express goes
//! through the encoder and this server's parser, and must come out with the same meaning.

use bytes::{Bytes, BytesMut};
use proptest::collection::vec;
use proptest::prelude::*;

use super::command::{Command, MetaStore, Mode, Value};
use super::manner::Manner;
use super::meta::Meta;
use super::parser::{Parsed, Parser};
use crate::protocol::encode;
use crate::{Direction, Key, Operation, Payload, StoreMode, Ttl};

/// A key, and the bytes that the server stores it under.
fn key() -> impl Strategy<Value = (Key, Bytes)> {
    let text = vec(
        (0x21..=0xff_u8).prop_filter("no DEL", |byte| *byte != 0x7f),
        1..250,
    );
    let binary = vec(any::<u8>(), 1..=186);
    prop_oneof![
        text.prop_map(|bytes| (Key::new(&bytes).unwrap(), bytes.into())),
        binary.prop_map(|bytes| (Key::binary(&bytes).unwrap(), bytes.into())),
    ]
}

fn payload() -> impl Strategy<Value = Payload> {
    let data = prop_oneof![vec(any::<u8>(), 0..300), vec(any::<u8>(), 4000..5000)];
    (data, any::<u32>()).prop_map(|(data, flags)| Payload::from(data).with_flags(flags))
}

/// A TTL, and what memcached must make of it.
fn ttl() -> impl Strategy<Value = (Ttl, i32)> {
    prop_oneof![
        Just((Ttl::NEVER, 0)),
        Just((Ttl::secs(0), -1)),
        (1..=2_592_000_i32).prop_map(|seconds| (Ttl::secs(seconds as u64), seconds)),
    ]
}

/// Cuts the stream into requests, and checks that nothing is left over.
fn parsed(operations: &[Operation]) -> Vec<Command> {
    let mut wire = BytesMut::new();
    for (opaque, operation) in (1..).zip(operations) {
        if let Some(body) = encode(operation, opaque, &mut wire) {
            wire.extend_from_slice(&body);
            wire.extend_from_slice(b"\r\n");
        }
    }
    let mut parser = Parser::new(1 << 20, true);
    let mut commands = Vec::new();
    loop {
        match parser.next(&mut wire, &Manner::default()) {
            Parsed::Request(request) => commands.push(request.command),
            Parsed::Incomplete => break,
            Parsed::Close => panic!("the server would close the connection"),
        }
    }
    assert!(wire.is_empty() && !parser.awaits_value());
    commands
}

fn one(operation: Operation) -> Command {
    let mut commands = parsed(&[operation]);
    assert_eq!(commands.len(), 1, "{commands:?}");
    commands.remove(0)
}

fn opaque(meta: &Meta) -> Option<&[u8]> {
    meta.flags.iter().find_map(|flag| flag.strip_prefix(b"O"))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn writes((key, stored) in key(), payload in payload(), (ttl, expiry) in ttl(), mode in 0..6_usize) {
        let (mode, expected) = [
            (StoreMode::Set, Mode::Set),
            (StoreMode::Add, Mode::Add),
            (StoreMode::Claim, Mode::Add),
            (StoreMode::Replace, Mode::Replace),
            (StoreMode::Append, Mode::Append),
            (StoreMode::Prepend, Mode::Prepend),
        ][mode];
        let operation = Operation::Store { mode, key, payload: payload.clone(), ttl };
        let Command::MetaStore(MetaStore { meta, mode, value }) = one(operation) else {
            panic!("not a write")
        };
        prop_assert_eq!(&meta.key, &stored);
        prop_assert_eq!(mode, expected);
        prop_assert_eq!(value, Value::Data(payload.data().clone()));
        prop_assert_eq!(meta.client_flags, payload.flags());
        let keeps = matches!(expected, Mode::Append | Mode::Prepend);
        prop_assert_eq!(meta.expiry, (!keeps).then_some(expiry));
        prop_assert_eq!(opaque(&meta), Some(&b"1"[..]));
        prop_assert!(!meta.quiet);
    }

    #[test]
    fn reads((key, stored) in key(), (ttl, expiry) in ttl(), kind in 0..3_u8) {
        let operation = match kind {
            0 => Operation::Get { key, with_cas: true },
            1 => Operation::GetAndTouch { key, ttl },
            _ => Operation::Touch { key, ttl },
        };
        let Command::MetaGet(meta) = one(operation) else { panic!("not a read") };
        prop_assert_eq!(&meta.key, &stored);
        prop_assert_eq!(meta.value, kind < 2);
        prop_assert_eq!(meta.expiry, (kind > 0).then_some(expiry));
        prop_assert_eq!(meta.flags.iter().any(|flag| &flag[..] == b"c"), kind == 0);
        prop_assert_eq!(opaque(&meta), Some(&b"1"[..]));
    }

    #[test]
    fn deletes_and_arithmetic((key, stored) in key(), delta in any::<u64>(), up in any::<bool>()) {
        let Command::MetaDelete(meta) = one(Operation::Delete { key: key.clone() }) else {
            panic!("not a delete")
        };
        prop_assert_eq!(&meta.key, &stored);
        let direction = if up { Direction::Up } else { Direction::Down };
        let operation = Operation::Arithmetic { key, delta, direction };
        let Command::MetaArithmetic(meta) = one(operation) else { panic!("not arithmetic") };
        prop_assert_eq!(&meta.key, &stored);
        prop_assert_eq!(meta.delta, delta);
        prop_assert_eq!(meta.mode, if up { b'I' } else { b'D' });
        prop_assert!(meta.value && meta.vivify.is_none());
    }

    #[test]
    fn multi_key_reads(keys in vec(key(), 1..20)) {
        let (keys, stored): (Vec<_>, Vec<_>) = keys.into_iter().unzip();
        let mut commands = parsed(&[Operation::GetMany { keys: keys.into() }]);
        prop_assert_eq!(commands.pop(), Some(Command::Noop));
        prop_assert_eq!(commands.len(), stored.len());
        for (index, (command, stored)) in commands.iter().zip(&stored).enumerate() {
            let Command::MetaGet(meta) = command else { panic!("not a read") };
            prop_assert_eq!(&meta.key, stored);
            prop_assert!(meta.quiet && meta.value);
            let expected = (index + 1).to_string();
            prop_assert_eq!(opaque(meta), Some(expected.as_bytes()));
        }
    }

    /// Whatever a value holds, it is never taken for a command.
    #[test]
    fn a_stream_of_writes_keeps_its_framing(values in vec(payload(), 1..10)) {
        let write = |payload: &Payload| Operation::Store {
            mode: StoreMode::Set,
            key: Key::new("k").unwrap(),
            payload: payload.clone(),
            ttl: Ttl::NEVER,
        };
        let commands = parsed(&values.iter().map(write).collect::<Vec<_>>());
        prop_assert_eq!(commands.len(), values.len());
        for (command, payload) in commands.iter().zip(&values) {
            let Command::MetaStore(store) = command else { panic!("not a write") };
            prop_assert_eq!(&store.value, &Value::Data(payload.data().clone()));
        }
    }
}

#[test]
fn questions_to_a_node() {
    assert_eq!(one(Operation::Version), Command::Version);
    assert!(matches!(
        one(Operation::FlushAll),
        Command::FlushAll { delay: 0 | -1, .. }
    ));
    assert!(matches!(one(Operation::Stats), Command::Stats(_)));
}
