//! Three members, of which some die or hang; two drivers at once; and a source that misses nothing.

use std::{
    sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    thread::{scope, sleep},
    time::Duration,
};

use anyport::{
    api::{Problem, ProblemKind},
    fleet::{
        etcd::{Etcd as Client, Swapped},
        layout::{Hash, Name, Pointer, Time},
        pack::Packed,
        settings::ConnectionSettings,
        watch::EtcdSource,
    },
};
use anyport_tests::{
    backbone::Backbone,
    driver::{Driver, text},
    etcd::Etcd,
    host::wait_for,
    netns::Netns,
    steady::EndOfWork,
};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::{cases::trial, control::contains};

/// Longer than an election takes, on a busy machine, too.
const PATIENCE: Duration = Duration::from_secs(20);

pub(super) fn trials() -> Vec<Trial> {
    vec![
        trial("fleet::the leader is killed while sets are published", killed_leader),
        trial("fleet::the leader is parted from the others while sets are published", parted_leader),
        trial("fleet::a member hangs, and one is gone", hanging_member),
        trial("fleet::a change that is given up may come true, and says so", given_up),
        trial("fleet::operators race", race),
        trial("fleet::who comes second is told, and sets that are needed stay", second),
        trial("fleet::a source misses nothing", source),
    ]
}

fn killed_leader() {
    const CHANGES: u64 = 30;
    let namespace = Netns::new();
    let mut etcd = Etcd::three(&namespace);
    let driver = Driver::of(&namespace, &etcd);
    let leader = etcd.leader();
    scope(|scope| {
        scope.spawn(|| {
            for number in 0..CHANGES {
                let file = driver.file(&number.to_string(), &format!("192.0.2.{number}\n"));
                driver.ok(&format!("publish {file} --ring canary --timeout 30s"));
            }
        });
        sleep(Duration::from_millis(400));
        etcd.kill(leader);
    });
    // Each change was made once, whether or not the answer to it was lost.
    let history = driver.json("history --ring canary");
    let sequences: Vec<u64> =
        history.as_array().expect("records").iter().filter_map(|it| it["sequence"].as_u64()).collect();
    assert_eq!(sequences, (1..=CHANGES).rev().collect::<Vec<_>>());
    assert_ne!(etcd.leader(), leader);
    etcd.restart(leader);
    let alone = Driver { options: vec!["--etcd".into(), etcd.url(leader)], ..driver };
    assert_eq!(alone.sequence("canary"), CHANGES);
}

/// Publishes set after set until `is_over`, and tells of each whether it was.
fn publish_until(driver: &Driver, is_over: &AtomicBool, done: &AtomicUsize) -> Vec<bool> {
    let mut outcomes = Vec::new();
    while !is_over.load(Relaxed) {
        let number = outcomes.len();
        let file = driver.file("set", &format!("192.0.2.{number}\n"));
        let outcome = driver.run(&format!("publish {file} --ring canary --note {number} --timeout 10s"));
        let is_done = outcome.status == 0;
        assert!(is_done || (outcome.status == 3 && outcome.stderr.contains("does not answer")), "{outcome}");
        outcomes.push(is_done);
        done.fetch_add(usize::from(is_done), Relaxed);
    }
    outcomes
}

fn parted_leader() {
    let backbone = Backbone::new(0);
    let etcd = Etcd::start(&backbone.members(3));
    let driver = Driver::of(&backbone.router, &etcd);
    let leader = etcd.leader();
    let alone = Driver { options: vec!["--etcd".into(), etcd.url(leader)], ..Driver::of(&backbone.router, &etcd) };
    let (is_over, done) = (AtomicBool::new(false), AtomicUsize::new(0));
    let wait_for_more = || {
        let enough = done.load(Relaxed) + 5;
        wait_for("sets that are published", PATIENCE, || match done.load(Relaxed) {
            now if now >= enough => Ok(()),
            now => Err(now.to_string()),
        });
    };
    let outcomes = scope(|scope| {
        let publishing = scope.spawn(|| publish_until(&driver, &is_over, &done));
        let end = EndOfWork(&is_over);
        wait_for_more();
        etcd.part(leader);
        wait_for_more();
        // The majority goes on, and who is apart from it tells nothing that is over.
        assert!((0..3).any(|member| member != leader && etcd.leads(member)));
        contains(&alone.refused("status --ring canary --timeout 2s", 3), &["does not answer"]);
        etcd.rejoin(leader);
        wait_for_more();
        drop(end);
        publishing.join().expect("outcomes")
    });
    // One history without gaps. What was published is in it once; of what was given up it is not known.
    let (history, of_leader) = (driver.json("history --ring canary"), alone.json("history --ring canary"));
    assert_eq!(history, of_leader);
    let entries: Vec<(u64, usize)> = history
        .as_array()
        .expect("records")
        .iter()
        .rev()
        .map(|it| (it["sequence"].as_u64().expect("a sequence"), text(&it["note"]).parse().expect("a number")))
        .collect();
    assert!(entries.iter().map(|it| it.0).eq(1..=entries.len() as u64), "{entries:?}");
    assert!(entries.is_sorted_by(|one, next| one.1 < next.1), "{entries:?}");
    for (number, _) in outcomes.iter().enumerate().filter(|it| *it.1) {
        assert!(entries.iter().any(|it| it.1 == number), "{number} was published, and is not in {entries:?}");
    }
}

fn hanging_member() {
    let namespace = Netns::new();
    let mut etcd = Etcd::three(&namespace);
    let driver = Driver::of(&namespace, &etcd);
    let file = |number: u32| driver.file("set", &format!("192.0.2.{number}\n"));
    etcd.kill(0);
    driver.ok(&format!("publish {} --ring canary --timeout 30s", file(1)));
    // Two of three are needed.
    etcd.freeze(1);
    contains(&driver.refused(&format!("publish {} --ring canary --timeout 2s", file(2)), 3), &["does not answer"]);
    etcd.thaw(1);
    etcd.restart(0);
    etcd.freeze(2);
    driver.ok(&format!("publish {} --ring canary --timeout 30s", file(3)));
    etcd.thaw(2);
}

fn race() {
    const OPERATORS: usize = 6;
    let namespace = Netns::new();
    let etcd = Etcd::alone(&namespace);
    let driver = Driver::of(&namespace, &etcd);
    let outcomes: Vec<_> = scope(|scope| {
        let driver = &driver;
        let publish = |number| {
            let file = driver.file(&format!("{number}"), &format!("192.0.2.{number}\n"));
            driver.run(&format!("publish {file} --ring canary --note by-{number}"))
        };
        let threads: Vec<_> = (0..OPERATORS).map(|number| scope.spawn(move || publish(number))).collect();
        threads.into_iter().map(|it| it.join().expect("an outcome")).collect()
    });
    let history = driver.json("history --ring canary");
    let history = history.as_array().expect("records");
    assert_eq!(history.len(), outcomes.iter().filter(|it| it.status == 0).count(), "{outcomes:?}");
    for outcome in outcomes.iter().filter(|it| it.status != 0) {
        assert_eq!(outcome.status, 1, "{outcome}");
        contains(&outcome.stderr, &["was changed meanwhile", "gave it the set", "(by-", "fleet history --ring canary"]);
    }
    for entry in history {
        assert!(!etcd.record(&format!("/anyport/sets/{}", text(&entry["set"]))).is_null(), "{entry}");
    }
}

fn given_up() {
    let namespace = Netns::new();
    let etcd = Etcd::alone(&namespace);
    let ring: Name = "canary".parse().expect("a name");
    let set = Packed::new("192.0.2.1\n").expect("a set");
    with_client(&namespace, &etcd, Duration::from_secs(2), async |client| {
        let before = client.ring(&ring).await.expect("a ring");
        let manifest = client.store(&set, &mut |_, _| ()).await.expect("a set");
        etcd.freeze(0);
        let problem = client.swap(&before, &pointer(&ring, 1, set.hash, "me"), manifest).await.expect_err("no answer");
        assert_eq!(problem.kind, ProblemKind::NoDaemon);
        contains(&problem.error, &["does not answer: change the ring canary"]);
        contains(&problem.hint, &["may have been made", "fleet history --ring canary"]);
        etcd.thaw(0);
    });
}

/// Runs in a namespace, with a client of its own.
pub(super) fn with_client<T: Send>(
    namespace: &Netns,
    etcd: &Etcd,
    patience: Duration,
    run: impl AsyncFnOnce(Client) -> T + Send,
) -> T {
    let settings = ConnectionSettings { etcd: vec![etcd.urls()], ..ConnectionSettings::default() };
    namespace.enter(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
        runtime.block_on(async {
            let endpoints = settings.read().expect("settings");
            run(Client::connect(&endpoints, patience).await.expect("a connection")).await
        })
    })
}

fn pointer(ring: &Name, sequence: u64, set: Hash, by: &str) -> Pointer {
    Pointer {
        ring: ring.clone(),
        sequence,
        set,
        published: Time::now(),
        by: by.into(),
        note: None,
        from: None,
        signature: None,
    }
}

fn second() {
    let namespace = Netns::new();
    let etcd = Etcd::alone(&namespace);
    let ring: Name = "canary".parse().expect("a name");
    with_client(&namespace, &etcd, PATIENCE, async |client| {
        let (one, two) = (Packed::new("192.0.2.1\n").expect("a set"), Packed::new("192.0.2.2\n").expect("a set"));
        let both = client.ring(&ring).await.expect("a ring");
        let stored = client.store(&one, &mut |_, _| ()).await.expect("a set");
        let other = client.store(&two, &mut |_, _| ()).await.expect("a set");
        let first = pointer(&ring, 1, one.hash, "first");
        let done = client.swap(&both, &first, stored).await.expect("an answer");
        assert!(matches!(done, Swapped::Done(_)), "{done:?}");
        // An answer was lost, and the same is asked again.
        let again = client.swap(&both, &first, stored).await.expect("an answer");
        assert!(matches!(again, Swapped::Done(_)), "{again:?}");
        let lost = client.swap(&both, &pointer(&ring, 1, two.hash, "second"), other).await.expect("an answer");
        let Swapped::Lost(Some(found)) = lost else { panic!("{lost:?}") };
        assert_eq!(found.value, first);
        // Another client removes unused sets between storing a set and pointing to it.
        assert_eq!(client.remove_unused_sets().await.expect("an answer"), 1);
        let now = client.ring(&ring).await.expect("a ring");
        let gone = client.swap(&now, &pointer(&ring, 2, two.hash, "second"), other).await.expect("an answer");
        assert!(matches!(gone, Swapped::SetGone), "{gone:?}");
        let (_, before_stored) = client.pointer(&ring).await.expect("an answer");
        let stored = client.store(&two, &mut |_, _| ()).await.expect("a set");
        let (_, before_used) = client.pointer(&ring).await.expect("an answer");
        let kept = async |since| !client.remove_unless_changed(&two.hash, since).await.expect("an answer");
        assert!(kept(before_stored).await, "what was stored since is removed");
        let done = client.swap(&now, &pointer(&ring, 2, two.hash, "second"), stored).await.expect("an answer");
        assert!(matches!(done, Swapped::Done(_)), "{done:?}");
        assert!(kept(before_used).await, "what is pointed to since is removed");
        assert_eq!(client.remove_unused_sets().await.expect("an answer"), 0);
        assert_eq!(client.set(&one.hash).await.expect("a set"), "192.0.2.1\n");
    });
}

/// The sequence of what a source tells next, soon.
async fn next(source: &mut EtcdSource) -> Option<u64> {
    let told = async {
        loop {
            match source.changed().await {
                Ok(pointer) => return pointer.map(|it| it.value.sequence),
                Err(Problem { error, .. }) if error.contains("does not answer") || error.contains("watch") => {}
                Err(problem) => panic!("{problem:?}"),
            }
        }
    };
    tokio::time::timeout(PATIENCE, told).await.expect("a change within 20 s")
}

/// That a source has nothing to tell.
async fn nothing(source: &mut EtcdSource) {
    let told = tokio::time::timeout(Duration::from_millis(700), source.changed()).await;
    assert!(told.is_err(), "{told:?}");
}

fn source() {
    let namespace = Netns::new();
    let mut etcd = Etcd::alone(&namespace);
    let driver = Driver::of(&namespace, &etcd);
    let publish = |number: u32| {
        let file = driver.file("set", &format!("192.0.2.{number}\n"));
        let published: Value = driver.json(&format!("publish {file} --ring canary"));
        published["sequence"].as_u64()
    };
    let settings = ConnectionSettings { etcd: vec![etcd.urls()], ..ConnectionSettings::default() };
    namespace.enter(|| {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        runtime.expect("a runtime").block_on(async {
            let client = Client::connect(&settings.read().expect("settings"), PATIENCE).await.expect("a connection");
            let mut source = super::nodes::source(client, &"canary".parse().expect("a name"));
            assert!(source.pointer().await.expect("an answer").is_none());
            nothing(&mut source).await;
            assert_eq!(publish(1), Some(1));
            assert_eq!(next(&mut source).await, Some(1));
            // Other keys change, and the history is compacted while nobody listens.
            assert_eq!((publish(2), publish(3)), (Some(2), Some(3)));
            etcd.compact();
            while next(&mut source).await != Some(3) {}
            nothing(&mut source).await;
            let backup = etcd.backup("of 3");
            assert_eq!(publish(4), Some(4));
            // etcd ends, and what is published before the watch is there again is not missed.
            etcd.kill(0);
            etcd.restart(0);
            assert_eq!(publish(5), Some(5));
            while next(&mut source).await != Some(5) {}
            etcd.restore(&backup);
            assert_eq!(next(&mut source).await, Some(3), "an older backup is told, too");
            etcd.put("/anyport/rings/canary", "nonsense");
            let nonsense = tokio::time::timeout(PATIENCE, source.changed()).await.expect("an answer");
            assert!(nonsense.is_err_and(|it| it.error.contains("can't be read")));
            etcd.wipe();
            assert_eq!(next(&mut source).await, None);
            assert_eq!(publish(6), Some(1));
            assert_eq!(next(&mut source).await, Some(1));
        });
    });
}
