//! `Config`: a builder's settings as plain data, and what is said of one that makes no sense.

use std::fmt::Debug;
use std::time::Duration;

use tower_memcached::{
    BreakerSettings, Client, Config, Credentials, ErrorKind, ExecutorConfig, FailureMode,
    GroupSettings, JournalOverflow, JournalSettings, LoadLimits, NodeConfig, ProbeSettings,
    ReadThroughSettings, RetryBudget, Ring, SocketSettings, TlsSettings,
};

const fn ms(milliseconds: u64) -> Duration {
    Duration::from_millis(milliseconds)
}

/// Debug names every field, private ones too.
fn same(one: &impl Debug, other: &impl Debug) {
    assert_eq!(format!("{one:#?}"), format!("{other:#?}"));
}

fn limits() -> LoadLimits {
    let limits = LoadLimits::default().max_concurrent(3).max_queue(4);
    let limits = limits.max_wait(ms(5)).rate(6).burst(7);
    limits.throttle(1.5, Duration::from_secs(8))
}

fn read_through() -> ReadThroughSettings {
    ReadThroughSettings::default()
        .database("items")
        .load_timeout(ms(900))
        .leases(false)
        .lease(Duration::from_secs(3))
        .lease_wait(ms(200))
        .stale_while_revalidate(Duration::from_secs(90))
        .stale_if_error(Duration::from_secs(3_600))
        .early_refresh(0.5)
        .ttl_jitter(0.25)
        .negative_ttl(Duration::from_secs(2))
        .max_refills(12)
}

fn group() -> GroupSettings {
    GroupSettings::default()
        .prefix("session:")
        .timeout(ms(20))
        .attempt_timeout(ms(10))
        .max_in_flight(200)
        .max_queue(20)
        .max_wait(ms(5))
        .rate(1_000)
        .burst(50)
        .killed(true)
        .failure_mode(FailureMode::Cancel)
        .failover_ttl(Duration::from_secs(9))
        .max_attempts(2)
        .retry_budget(RetryBudget::new(5, 1))
        .max_ejection_percent(34)
        .hedged_gets(true)
        .read_through(read_through())
        .nodes(["10.0.0.9", "[::1]:11212"])
}

fn socket() -> SocketSettings {
    SocketSettings::default()
        .nodelay(false)
        .keepalive(Duration::from_secs(45))
        .bind([127, 0, 0, 1].into())
}

fn tls() -> TlsSettings {
    TlsSettings::default()
        .ca_file("/etc/cache/ca.pem")
        .system_roots(true)
        .client_cert_file("/etc/cache/client.pem")
        .client_key_file("/etc/cache/client-key.pem")
        .server_name("cache.example")
        .connect_timeout(ms(500))
}

/// Nothing in it is as by default.
fn everything() -> Config {
    let mut config = Config::default();
    config.nodes = vec![
        NodeConfig::new("10.0.0.1:11211"),
        NodeConfig::new("unix:/run/memcached").with_weight(3),
    ];
    config.timeout = ms(80);
    config.attempt_timeout = Duration::from_micros(25_500);
    config.stall_timeout = Some(ms(70));
    config.connect_timeout = Some(ms(60));
    config.socket = socket();
    config.tls = Some(tls());
    config.connections = 2;
    config.max_in_flight = 1_000;
    config.adaptive_limit = true;
    config.max_value_size = 2_000;
    config.failure_mode = FailureMode::Retry;
    config.failover_ttl = Duration::from_secs(30);
    config.max_attempts = 4;
    config.retry_budget = RetryBudget::new(10, 5);
    config.max_ejection_percent = 25;
    config.hedged_gets = true;
    config.ring = Ring::spymemcached();
    config.breaker = BreakerSettings::default()
        .consecutive_timeouts(4)
        .failure_rate(40)
        .slow_call_rate(70)
        .slow_call(ms(11))
        .minimum_requests(30)
        .reopening(Duration::from_secs(2), Duration::from_secs(20))
        .ramp(Duration::ZERO);
    config.probe = ProbeSettings::default()
        .initial_delay(ms(1))
        .period(ms(700))
        .timeout(ms(300))
        .failure_threshold(4)
        .success_threshold(5);
    let journal = JournalSettings::default().capacity(17);
    config.journal = journal.overflow(JournalOverflow::Flush);
    config.killed = true;
    config.executor = Some(ExecutorConfig::Dedicated {
        name: "cache".into(),
        threads: 2,
    });
    config.load_executor = Some(ExecutorConfig::Current);
    config.read_through = read_through();
    config.databases.insert("items".into(), limits());
    config.groups.insert("sessions".into(), group());
    config
        .groups
        .insert("plain".into(), GroupSettings::default());
    config
}

#[test]
fn the_default_is_what_a_builder_has_that_was_told_nothing() {
    let told_nothing = format!("{:#?}", Client::builder());
    let defaults = Client::builder().config(Config::default());
    assert_eq!(told_nothing, format!("{defaults:#?}"));
}

#[test]
fn a_builders_methods_say_what_a_config_says() {
    let config = everything();
    let mut builder = Client::builder()
        .nodes(["10.0.0.1:11211"])
        .weighted_node("unix:/run/memcached", 3)
        .timeout(config.timeout)
        .attempt_timeout(config.attempt_timeout)
        .stall_timeout(ms(70))
        .connect_timeout(ms(60))
        .socket(socket())
        .tls(tls())
        .connections(2)
        .max_in_flight(1_000)
        .adaptive_limit(true)
        .max_value_size(2_000)
        .failure_mode(FailureMode::Retry)
        .failover_ttl(config.failover_ttl)
        .max_attempts(4)
        .retry_budget(config.retry_budget)
        .max_ejection_percent(25)
        .hedged_gets(true)
        .ring(config.ring.clone())
        .breaker(config.breaker.clone())
        .probe(config.probe.clone())
        .journal(config.journal.clone())
        .read_through(read_through())
        .database("items", limits());
    builder = builder
        .group("sessions", group())
        .group("plain", GroupSettings::default());
    // What a builder takes in another way: executors, and a switch that is thrown by hand.
    let mut same_config = config.clone();
    (
        same_config.killed,
        same_config.executor,
        same_config.load_executor,
    ) = (false, None, None);
    same(&builder, &Client::builder().config(same_config));
}

/// What each client refuses to be made of, and how it is named.
#[test]
fn each_setting_that_makes_no_sense_is_refused_by_its_path() {
    type Break = fn(&mut Config);
    fn sessions(config: &mut Config, change: fn(GroupSettings) -> GroupSettings) {
        let before = config.groups.remove("sessions").unwrap();
        config.groups.insert("sessions".into(), change(before));
    }
    fn items(config: &mut Config, change: fn(LoadLimits) -> LoadLimits) {
        config
            .databases
            .insert("items".into(), change(LoadLimits::default()));
    }
    fn reads(config: &mut Config, change: fn(ReadThroughSettings) -> ReadThroughSettings) {
        config.read_through = change(ReadThroughSettings::default());
    }
    let cases: &[(&str, Break)] = &[
        ("nodes", |config| config.nodes.clear()),
        ("nodes[1]", |config| config.nodes[1].address = "a b".into()),
        ("nodes[1]", |config| config.nodes[1].weight = 0),
        ("nodes[1]", |config| {
            config.nodes[1] = config.nodes[0].clone()
        }),
        ("nodes[0]", |config| {
            config.nodes[0].address = "host:port".into()
        }),
        ("timeout", |config| config.timeout = Duration::ZERO),
        ("attempt_timeout", |config| {
            config.attempt_timeout = Duration::ZERO
        }),
        ("stall_timeout", |config| {
            config.stall_timeout = Some(Duration::ZERO)
        }),
        ("connect_timeout", |config| {
            config.connect_timeout = Some(Duration::ZERO)
        }),
        ("socket.keepalive", |config| {
            config.socket = SocketSettings::default().keepalive(ms(999));
        }),
        ("credentials.user", |config| {
            config.credentials = Some(Credentials::new("", "password"));
        }),
        ("credentials.password", |config| {
            config.credentials = Some(Credentials::new("user", "pass word"));
        }),
        ("connections", |config| {
            (config.connections, config.hedged_gets) = (0, false)
        }),
        ("max_in_flight", |config| config.max_in_flight = 0),
        ("max_value_size", |config| {
            config.max_value_size = usize::MAX
        }),
        ("failover_ttl", |config| {
            config.failover_ttl = Duration::ZERO
        }),
        ("max_attempts", |config| config.max_attempts = 0),
        ("hedged_gets", |config| config.connections = 1),
        ("breaker.consecutive_timeouts", |config| {
            config.breaker = BreakerSettings::default().consecutive_timeouts(0);
        }),
        ("breaker.failure_rate", |config| {
            config.breaker = BreakerSettings::default().failure_rate(0);
        }),
        ("breaker.slow_call_rate", |config| {
            config.breaker = BreakerSettings::default().slow_call_rate(0);
        }),
        ("breaker.slow_call", |config| {
            config.breaker = BreakerSettings::default().slow_call(Duration::ZERO);
        }),
        ("probe.period", |config| {
            config.probe = ProbeSettings::default().period(Duration::ZERO);
        }),
        ("probe.timeout", |config| {
            config.probe = ProbeSettings::default().timeout(Duration::ZERO);
        }),
        ("probe.failure_threshold", |config| {
            config.probe = ProbeSettings::default().failure_threshold(0);
        }),
        ("probe.success_threshold", |config| {
            config.probe = ProbeSettings::default().success_threshold(0);
        }),
        ("read_through.load_timeout", |config| {
            reads(config, |reads| reads.load_timeout(Duration::ZERO))
        }),
        ("read_through.lease", |config| {
            reads(config, |reads| reads.lease(Duration::ZERO))
        }),
        ("read_through.lease_wait", |config| {
            reads(config, |reads| reads.lease_wait(ms(1_000)))
        }),
        ("read_through.early_refresh", |config| {
            reads(config, |reads| reads.early_refresh(-1.0))
        }),
        ("read_through.early_refresh", |config| {
            reads(config, |reads| reads.early_refresh(f64::NAN))
        }),
        ("read_through.ttl_jitter", |config| {
            reads(config, |reads| reads.ttl_jitter(1.5))
        }),
        ("read_through.negative_ttl", |config| {
            reads(config, |reads| reads.negative_ttl(Duration::ZERO))
        }),
        ("read_through.stale_if_error", |config| {
            reads(config, |reads| reads.stale_if_error(Duration::MAX))
        }),
        ("read_through.stale_while_revalidate", |config| {
            reads(config, |reads| reads.stale_while_revalidate(Duration::MAX));
        }),
        ("read_through.max_refills", |config| {
            reads(config, |reads| reads.max_refills(0))
        }),
        ("read_through.database", |config| {
            reads(config, |reads| reads.database("none"))
        }),
        ("databases.items.max_concurrent", |config| {
            items(config, |items| items.max_concurrent(0))
        }),
        ("databases.items.rate", |config| {
            items(config, |items| items.rate(0))
        }),
        ("databases.items.burst", |config| {
            items(config, |items| items.rate(1).burst(0))
        }),
        ("databases.items.burst", |config| {
            items(config, |items| items.burst(1))
        }),
        ("databases.items.throttle_k", |config| {
            items(config, |items| items.throttle(0.5, Duration::from_secs(9)));
        }),
        ("databases.items.throttle_window", |config| {
            items(config, |items| items.throttle(2.0, ms(1)))
        }),
        ("groups.sessions.prefix", |config| {
            sessions(config, |group| group.prefix("a b"))
        }),
        ("groups.sessions.prefix", |config| {
            sessions(config, |group| group.prefix("p".repeat(250)))
        }),
        ("groups.sessions.timeout", |config| {
            sessions(config, |group| group.timeout(Duration::ZERO))
        }),
        ("groups.sessions.attempt_timeout", |config| {
            sessions(config, |group| group.attempt_timeout(Duration::ZERO));
        }),
        ("groups.sessions.max_in_flight", |config| {
            sessions(config, |group| group.max_in_flight(0))
        }),
        ("groups.sessions.max_queue", |config| {
            sessions(config, |_| GroupSettings::default().max_queue(1));
        }),
        ("groups.sessions.rate", |config| {
            sessions(config, |group| group.rate(0))
        }),
        ("groups.sessions.burst", |config| {
            sessions(config, |group| group.burst(0))
        }),
        ("groups.sessions.burst", |config| {
            sessions(config, |_| GroupSettings::default().burst(1))
        }),
        ("groups.sessions.failover_ttl", |config| {
            sessions(config, |group| group.failover_ttl(Duration::ZERO));
        }),
        ("groups.sessions.max_attempts", |config| {
            sessions(config, |group| group.max_attempts(0))
        }),
        ("groups.sessions.hedged_gets", |config| {
            (config.connections, config.hedged_gets) = (1, false);
        }),
        ("groups.sessions.read_through.database", |config| {
            sessions(config, |group| {
                group.read_through(read_through().database("none"))
            });
        }),
        ("groups.sessions.read_through.max_refills", |config| {
            sessions(config, |group| {
                group.read_through(read_through().max_refills(0))
            });
        }),
        ("groups.sessions.nodes", |config| {
            sessions(config, |group| group.nodes(Vec::<String>::new()))
        }),
        ("groups.sessions.nodes[1]", |config| {
            sessions(config, |group| group.nodes(["a", ""]))
        }),
        ("groups.sessions.nodes[1]", |config| {
            sessions(config, |group| group.nodes(["a", "a:11211"]))
        }),
    ];
    let well = || {
        let mut config = everything();
        // This is no runtime.
        (config.executor, config.load_executor) = (None, None);
        // These files are not there.
        config.tls = None;
        config
    };
    let client = Client::builder().config(well()).build().unwrap();
    for (path, break_it) in cases {
        let mut config = well();
        break_it(&mut config);
        let mut errors = vec![
            Client::builder()
                .config(config.clone())
                .build()
                .unwrap_err(),
        ];
        if !path.ends_with("nodes") {
            // None is to leave them.
            errors.push(client.reconfigure(config).unwrap_err());
        }
        for error in errors {
            assert_eq!(error.kind(), ErrorKind::InvalidConfiguration, "{path}");
            let says = format!(": {path}: ");
            assert!(error.to_string().contains(&says), "{path}: {error}");
        }
    }
}

/// Rather than to speak in plain text.
#[cfg(not(feature = "tls"))]
#[test]
fn tls_is_refused_where_it_was_not_built_in() {
    let mut config = Config::default();
    config.nodes = vec![NodeConfig::new("10.0.0.1")];
    config.tls = Some(TlsSettings::default());
    let error = Client::builder().config(config).build().unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidConfiguration);
    assert!(error.to_string().contains("the feature `tls`"), "{error}");
}

#[cfg(feature = "serde")]
mod data {
    use super::*;

    #[test]
    fn everything_goes_through_toml_and_json_and_back() {
        let config = everything();
        let text = toml::to_string(&config).unwrap();
        same(&toml::from_str::<Config>(&text).unwrap(), &config);
        let text = serde_json::to_string(&config).unwrap();
        same(&serde_json::from_str::<Config>(&text).unwrap(), &config);
        let default = toml::to_string(&Config::default()).unwrap();
        same(
            &toml::from_str::<Config>(&default).unwrap(),
            &Config::default(),
        );
        for overflow in [
            JournalOverflow::Refuse,
            JournalOverflow::Flush,
            JournalOverflow::Serve,
        ] {
            let journal = JournalSettings::default().overflow(overflow);
            let text = toml::to_string(&journal).unwrap();
            same(&toml::from_str::<JournalSettings>(&text).unwrap(), &journal);
        }
        for mode in [
            FailureMode::Redistribute,
            FailureMode::Cancel,
            FailureMode::Retry,
        ] {
            let text = serde_json::to_string(&mode).unwrap();
            assert_eq!(serde_json::from_str::<FailureMode>(&text).unwrap(), mode);
        }
    }

    /// So that no copy of a configuration tells them.
    #[test]
    fn a_password_is_read_and_never_written() {
        let text = r#"credentials = { user = "user", password = "secret" }"#;
        let config: Config = toml::from_str(text).unwrap();
        let credentials = Credentials::new("user", "secret");
        assert_eq!(config.credentials, Some(credentials.clone()));
        let builder = Client::builder().credentials(credentials);
        same(&builder, &Client::builder().config(config.clone()));
        let written = toml::to_string(&config).unwrap();
        for shown in [&written, &format!("{config:?}"), &format!("{builder:?}")] {
            assert!(
                shown.contains("user") && !shown.contains("secret"),
                "{shown}"
            );
        }
        // Nor is it forgotten in silence.
        let error = toml::from_str::<Config>(&written).unwrap_err();
        assert!(
            error.to_string().contains("missing field `password`"),
            "{error}"
        );
    }

    #[test]
    fn nothing_is_the_default_at_every_level() {
        same(&toml::from_str::<Config>("").unwrap(), &Config::default());
        same(
            &serde_json::from_str::<Config>("{}").unwrap(),
            &Config::default(),
        );
        let text = "[breaker]\n[probe]\n[journal]\n[read_through]\n[retry_budget]";
        same(&toml::from_str::<Config>(text).unwrap(), &Config::default());
        let config: Config = toml::from_str("[groups.g]\n[databases.d]").unwrap();
        same(&config.groups["g"], &GroupSettings::default());
        same(&config.databases["d"], &LoadLimits::default());
    }

    /// As a service would write it.
    #[test]
    fn a_service_says_what_differs_and_no_more() {
        let config: Config = toml::from_str(
            r#"
            nodes = ["10.0.0.1:11211", { address = "10.0.0.2", weight = 2 }, { address = "10.0.0.3" }]
            timeout = "80ms"
            attempt_timeout = "1s 500ms"
            failure_mode = "cancel"
            ring = "spymemcached"
            executor = { kind = "dedicated", threads = 2 }
            load_executor = { kind = "current" }
            journal = { overflow = "flush" }
            retry_budget = { percent = 5 }

            [breaker]
            ramp = "0s"

            [groups.sessions]
            rate = 100
            timeout = "500us"
            "#,
        )
        .unwrap();
        let nodes = [("10.0.0.1:11211", 1), ("10.0.0.2", 2), ("10.0.0.3", 1)];
        let nodes = nodes.map(|(node, weight)| NodeConfig::new(node).with_weight(weight));
        let mut expected = Config::default();
        expected.nodes = nodes.into();
        expected.timeout = ms(80);
        expected.attempt_timeout = ms(1_500);
        expected.failure_mode = FailureMode::Cancel;
        expected.ring = Ring::spymemcached();
        expected.executor = Some(ExecutorConfig::Dedicated {
            name: "memcached-io".into(),
            threads: 2,
        });
        expected.load_executor = Some(ExecutorConfig::Current);
        expected.journal = JournalSettings::default().overflow(JournalOverflow::Flush);
        expected.retry_budget = RetryBudget::new(5, 10);
        expected.breaker = BreakerSettings::default().ramp(Duration::ZERO);
        let sessions = GroupSettings::default().rate(100);
        let sessions = sessions.timeout(Duration::from_micros(500));
        expected.groups.insert("sessions".into(), sessions);
        same(&config, &expected);
    }

    #[test]
    fn durations_are_written_for_people() {
        let text = toml::to_string(&everything()).unwrap();
        for line in [
            "timeout = \"80ms\"",
            "attempt_timeout = \"25ms 500us\"",
            "failover_ttl = \"30s\"",
            "stale_while_revalidate = \"1m 30s\"",
            "stale_if_error = \"1h\"",
        ] {
            assert!(
                text.lines().any(|written| written == line),
                "{line} in {text}"
            );
        }
    }

    #[test]
    fn fields_that_do_not_exist_are_refused_at_every_level() {
        for text in [
            "time_out = \"1s\"",
            "[breaker]\nfailures = 1",
            "[probe]\ninterval = \"1s\"",
            "[journal]\nsize = 1",
            "[retry_budget]\nratio = 1",
            "[read_through]\nttl = \"1s\"",
            "[read_through]\nguard = \"items\"",
            "[databases.items]\nmax_connections = 1",
            "[groups.sessions]\nmax_inflight = 1",
            "[groups.sessions.read_through]\nttl = \"1s\"",
            "[groups.sessions.retry_budget]\nratio = 1",
            "nodes = [{ address = \"a\", wieght = 2 }]",
            "executor = { kind = \"dedicated\", thread = 2 }",
            "executor = { kind = \"current\", threads = 2 }",
            "executor = { kind = \"current\", name = \"io\" }",
        ] {
            let error = toml::from_str::<Config>(text).unwrap_err().to_string();
            assert!(error.contains("unknown field"), "{text}: {error}");
        }
    }

    #[test]
    fn wrong_types_and_choices_are_refused() {
        for text in [
            "timeout = 100",
            "timeout = \"100\"",
            "timeout = \"-1s\"",
            "timeout = \"soon\"",
            "max_in_flight = -1",
            "max_in_flight = \"many\"",
            "hedged_gets = 1",
            "failure_mode = \"Cancel\"",
            "failure_mode = \"ignore\"",
            "ring = \"modulo\"",
            "nodes = \"10.0.0.1\"",
            "nodes = [1]",
            "nodes = [{ weight = 2 }]",
            "nodes = [{ address = \"a\", weight = -2 }]",
            "executor = \"current\"",
            "executor = { kind = \"everywhere\" }",
            "executor = { threads = 2 }",
            "groups = [\"sessions\"]",
            "databases = 1",
            "[journal]\noverflow = \"drop\"",
        ] {
            let parsed = toml::from_str::<Config>(text);
            assert!(parsed.is_err(), "{text}: {parsed:?}");
        }
    }

    #[tokio::test]
    async fn an_executor_of_each_kind_can_be_had_by_its_name() {
        for executor in ["{ kind = \"current\" }", "{ kind = \"dedicated\" }"] {
            let text = format!(
                "nodes = [\"127.0.0.1:1\"]\nexecutor = {executor}\nload_executor = {executor}"
            );
            let config: Config = toml::from_str(&text).unwrap();
            let client = Client::builder().config(config).build().unwrap();
            // Nothing listens there, which one learns where I/O works.
            let error = client.get("k").await.unwrap_err();
            assert!(error.is_unavailable() || error.is_timeout(), "{error}");
        }
    }
}
