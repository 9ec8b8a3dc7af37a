use proptest::prelude::*;
use tabularium_proto::coordinator::RepositoryName;

use super::*;

fn route(primary: &str, generation: i64, replicas: &[(&str, i64)]) -> Route {
    Route {
        repository_id: 1,
        name: Some(RepositoryName { virtual_storage: "default".into(), relative_path: "a.git".into() }),
        replica_path: "@cluster/repositories/6b/86/1".into(),
        primary: primary.into(),
        generation,
        epoch: 0,
        replicas: replicas
            .iter()
            .map(|(storage, generation)| Replica { storage: (*storage).into(), generation: *generation })
            .collect(),
        home_site: String::new(),
        ..Route::default()
    }
}

fn text<T: std::fmt::Debug>(result: Result<T, Refusal>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn reads_are_spread_over_what_is_up_to_date_and_healthy() {
    let route = route("a", 7, &[("a", 7), ("b", 6), ("c", 7), ("d", 7)]);
    let chosen: Vec<&str> = (0..4)
        .map(|spread| reader(&route, Reader::Any, |storage| storage != "d", &[], spread).unwrap())
        .collect();
    assert_eq!(chosen, ["a", "c", "a", "c"]);
    let after_failure = reader(&route, Reader::Any, |_| true, &["a".into(), "c".into()], 5).unwrap();
    assert_eq!(after_failure, "d");
}

#[test]
fn a_read_that_nobody_can_serve_says_why() {
    let route = route("a", 7, &[("a", 7), ("b", 6)]);
    let only_b = |storage: &str| storage == "b";
    assert_eq!(text(reader(&route, Reader::Any, only_b, &[], 0)), "no suitable node to serve the request");
    assert_eq!(text(reader(&route, Reader::Any, |_| false, &[], 0)), "no healthy nodes");
    assert_eq!(text(reader(&route, Reader::Primary, only_b, &[], 0)), "primary gitaly is not healthy");
    assert_eq!(reader(&route, Reader::Primary, |_| true, &[], 9).unwrap(), "a");
}

#[test]
fn maintenance_reaches_every_copy_and_the_primary_first() {
    let route = route("c", 7, &[("a", 6), ("b", -1), ("c", 7), ("d", 7)]);
    assert_eq!(maintained(&route, |storage| storage != "d").unwrap(), ["c", "a"]);
    assert_eq!(text(maintained(&route, |storage| storage == "b")), "no healthy nodes");
}

#[test]
fn any_healthy_storage_takes_what_is_aimed_at_a_storage() {
    assert_eq!((0..3).map(|n| any_storage(&[true, false, true], n).unwrap()).collect::<Vec<_>>(), [0, 2, 0]);
    assert_eq!(text(any_storage(&[false], 0)), "no healthy nodes");
    assert_eq!(text(any_storage(&[], 3)), "no healthy nodes");
}

#[test]
fn only_what_cannot_have_been_written_is_not_recorded() {
    use Presumed::{NotWritten, Unknown, Written};
    for (kind, ending, expected) in [
        (WriteKind::Update, Ending::Status(Code::Ok), Written),
        (WriteKind::Update, Ending::Status(Code::FailedPrecondition), Written),
        (WriteKind::Update, Ending::Status(Code::Unavailable), Written),
        (WriteKind::Update, Ending::Status(Code::Unimplemented), NotWritten),
        (WriteKind::Update, Ending::Lost, Unknown),
        (WriteKind::Create, Ending::Status(Code::Ok), Written),
        (WriteKind::Create, Ending::Status(Code::AlreadyExists), NotWritten),
        (WriteKind::Create, Ending::Lost, Unknown),
        (WriteKind::Upsert, Ending::Status(Code::Internal), Unknown),
    ] {
        assert_eq!(presumed(kind, ending), expected, "{kind:?} {ending:?}");
    }
}

#[test]
fn when_all_nodes_look_dead_none_is_blamed() {
    assert_eq!(unreachable_storages([("a", true), ("b", false)].into_iter()), Some(vec!["b".into()]));
    assert_eq!(unreachable_storages([("a", false), ("b", false)].into_iter()), None);
}

proptest! {
    #[test]
    fn a_reader_is_always_healthy_untried_and_up_to_date(
        generation in 0i64..4,
        replicas in prop::collection::vec((-1i64..5, any::<bool>(), any::<bool>()), 0..7),
        spread in any::<usize>(),
    ) {
        let names: Vec<String> = (0..replicas.len()).map(|number| format!("s{number}")).collect();
        let list: Vec<(&str, i64)> =
            names.iter().zip(&replicas).map(|(name, (generation, ..))| (name.as_str(), *generation)).collect();
        let route = route("s0", generation, &list);
        let place = |storage: &str| names.iter().position(|name| name == storage).unwrap();
        let tried: Vec<String> = names
            .iter()
            .zip(&replicas)
            .filter(|(_, (_, _, tried))| *tried)
            .map(|(name, _)| name.clone())
            .collect();
        let possible = replicas.iter().any(|(own, healthy, tried)| *own == generation && *healthy && !*tried);
        match reader(&route, Reader::Any, |storage| replicas[place(storage)].1, &tried, spread) {
            Ok(storage) => {
                let (own, healthy, tried) = replicas[place(storage)];
                prop_assert!(own == generation && healthy && !tried);
            }
            Err(_) => prop_assert!(!possible),
        }
    }

    #[test]
    fn successive_reads_use_every_usable_replica(count in 1usize..6, start in 0usize..1000) {
        let names: Vec<String> = (0..count).map(|number| format!("s{number}")).collect();
        let list: Vec<(&str, i64)> = names.iter().map(|name| (name.as_str(), 3)).collect();
        let route = route("s0", 3, &list);
        let mut seen: Vec<&str> = (start..start + count)
            .map(|spread| reader(&route, Reader::Any, |_| true, &[], spread).unwrap())
            .collect();
        seen.sort_unstable();
        seen.dedup();
        prop_assert_eq!(seen.len(), count);
    }
}

#[test]
fn a_route_goes_on_with_a_write_by_it_and_not_back() {
    let written = route("a", 3, &[("a", 3), ("b", 3), ("c", 2)]);
    let storages = ["a".to_owned(), "b".to_owned()];
    let next = advanced(&written, &written, &storages).unwrap();
    assert_eq!(next.generation, 4);
    assert_eq!(current(&next).collect::<Vec<_>>(), ["a", "b"]);
    assert_eq!((generation_of(&next, "c"), generation_of(&next, "x")), (2, -1));
    assert_eq!(generation_read(&next, Reader::Any), 4);
    // Known from before another router's write.
    let older = route("a", 2, &[("a", 2), ("b", 2), ("c", 2)]);
    assert_eq!(current(&advanced(&older, &written, &storages).unwrap()).count(), 2);
    assert!(advanced(&next, &written, &storages).is_none());
    assert!(advanced(&Route { epoch: 9, ..written.clone() }, &written, &storages).is_none());
    assert!(advanced(&Route { repository_id: 9, ..written.clone() }, &written, &storages).is_none());
}
