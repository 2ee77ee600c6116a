//! One suite of everything the client does, run against every server, over every kind of connection, in every protocol:
//! `docs/COMPATIBILITY.md` shows what comes of it, and is compared with it. What is run where is in `cells`.
#![cfg(all(
    feature = "testing",
    feature = "classic",
    feature = "tls",
    target_os = "linux"
))]

mod cells;
mod matrix;
mod sites;
mod suite;
mod support;
mod twemproxy;

use std::sync::Arc;

use futures::future::join_all;

use self::cells::{Cell, EXCEPTIONS};
use self::matrix::Matrix;
use self::sites::Site;
use self::suite::{SUITE, Verdict};

/// Every behaviour, one after the other, on a server of its own.
async fn run(cell: Cell) -> (Cell, Vec<Verdict>) {
    let site = Arc::new(Site::start(cell).await);
    let mut verdicts = Vec::new();
    for behaviour in SUITE {
        verdicts.push(suite::judge((behaviour.run)(Arc::clone(&site))).await);
    }
    (cell, verdicts)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn everything_works_everywhere_as_the_document_says() {
    for (name, _, _) in EXCEPTIONS {
        let known = SUITE.iter().any(|behaviour| behaviour.name == *name);
        assert!(known, "no such behaviour: {name}");
    }
    let matrix = Matrix(join_all(Cell::all().into_iter().map(run)).await);
    let mut wrong = Vec::new();
    for (cell, verdicts) in &matrix.0 {
        for (behaviour, verdict) in SUITE.iter().zip(verdicts) {
            let expected = Verdict::from(cell.expected(behaviour.name));
            if *verdict != expected {
                let name = behaviour.name;
                wrong.push(format!("{cell}: {name}: {verdict:?} and not {expected:?}"));
            }
        }
    }
    let matrix = matrix.to_string();
    println!("{matrix}");
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    matrix::compare_or_write(&matrix);
}

/// What the cells of twemproxy rest on.
#[tokio::test]
async fn twemproxy_spreads_keys_over_its_servers() {
    let directory = support::Directory::new();
    let proxy = twemproxy::Twemproxy::start(&directory, None).await;
    let client = |node: String| {
        let builder = tower_memcached::Client::builder().nodes([node]);
        let builder = builder.timeout(support::PATIENCE);
        builder
            .attempt_timeout(support::PATIENCE)
            .build()
            .expect("a client")
    };
    let through = client(proxy.address());
    let keys: Vec<String> = (0..100).map(|n| format!("key:{n}")).collect();
    for key in &keys {
        let set = through.set(key, key, tower_memcached::Ttl::NEVER).await;
        set.expect("it is stored");
    }
    let many = through.get_many(&keys).await;
    assert_eq!(many.into_hits().len(), keys.len());
    let mut found = 0;
    for server in proxy.servers() {
        let hits = client(server.address()).get_many(&keys).await.into_hits();
        assert!((1..keys.len()).contains(&hits.len()), "{}", hits.len());
        found += hits.len();
    }
    assert_eq!(found, keys.len());
}
