//! Every rule of the wire reference, section k.4, for every method that there is.
//!
//! Methods are called with the smallest request that names a repository or a storage where the registry says that it stands.
//! Who was asked, and what was recorded, is compared with the rule for its kind.

use std::collections::BTreeMap;

use prost::encoding::{WireType, encode_key, encode_varint};
use tabularium_common::methods::{Method, Operation, Registry, Scope};
use tonic::Code;

use crate::house::{House, REPOSITORY};

const PATH: &str = "beside.git";

/// What became of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    /// One up-to-date replica was asked.
    AnyReplica,
    /// The primary was asked, and is every time.
    Primary,
    /// A write of a repository that exists.
    Update,
    /// A write that makes one.
    Create,
    /// A write that does not mind.
    Upsert,
    /// All replicas were asked.
    All,
    /// One storage of several was asked.
    AnyStorage,
    /// The router answered, whatever it asked nodes for.
    Here,
    /// It is not offered.
    NotOffered,
}

fn field(number: u32, content: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    encode_key(number, WireType::LengthDelimited, &mut out);
    encode_varint(content.len() as u64, &mut out);
    out.extend_from_slice(content);
    out
}

fn nested(path: &[u32], content: &[u8]) -> Vec<u8> {
    path.iter().rev().fold(content.to_vec(), |content, number| field(*number, &content))
}

fn repository(path: &str) -> Vec<u8> {
    [field(2, b"default"), field(3, path.as_bytes())].concat()
}

/// Messages are merged when they are read: two of one field are as one.
fn request(method: &Method, path: &str) -> Vec<u8> {
    match &method.scope {
        Scope::Repository { target, additional } => {
            let mut message = nested(target, &repository(path));
            if let Some(additional) = additional {
                message.extend(nested(additional, &repository(REPOSITORY)));
            }
            message
        }
        Scope::Storage { name: Some(path) } | Scope::Partition { storage: path, .. } => {
            nested(path, b"default")
        }
        Scope::Storage { name: None } | Scope::None => Vec::new(),
    }
}

fn expected(method: &Method) -> Way {
    let storage_named = matches!(method.scope, Scope::Storage { name: Some(_) } | Scope::Partition { .. });
    match (method.operation, &method.scope) {
        _ if matches!(
            method.name.as_str(),
            "RepositoryExists" | "RemoveRepository" | "DeleteObjectPool" | "GetObjectPool" | "WalkRepos"
        ) =>
        {
            Way::Here
        }
        (Operation::Intercepted, _)
            if matches!(
                method.service.as_str(),
                "gitaly.ServerService" | "gitaly.PraefectInfoService" | "gitaly.RefTransaction"
            ) =>
        {
            Way::Here
        }
        (Operation::Accessor, Scope::Repository { .. }) if method.primary_only() => Way::Primary,
        (Operation::Accessor, Scope::Repository { .. }) => Way::AnyReplica,
        (Operation::Mutator, Scope::Repository { .. }) if method.creates() => Way::Create,
        (Operation::Mutator, Scope::Repository { .. }) if method.upserts() => Way::Upsert,
        (Operation::Mutator, Scope::Repository { .. }) => Way::Update,
        (Operation::Maintenance, Scope::Repository { .. }) => Way::All,
        (Operation::Accessor, _) if storage_named => Way::AnyStorage,
        _ => Way::NotOffered,
    }
}

async fn call(house: &House, method: &Method, path: &str) -> Way {
    let message = request(method, path);
    let began = house.coordinator.state().begins.len();
    let before: Vec<usize> = house.nodes.iter().map(|node| node.seen(&method.path).len()).collect();
    let code = house.raw(&method.path, &message).await.map_or_else(|status| status.code(), |_| Code::Ok);
    let asked: Vec<usize> = house
        .nodes
        .iter()
        .zip(before)
        .enumerate()
        .filter(|(_, (node, before))| node.seen(&method.path).len() > *before)
        .map(|(place, _)| place)
        .collect();
    let begins = house.coordinator.state().begins[began..].to_vec();
    match (&asked[..], &begins[..]) {
        ([], []) if code == Code::Unimplemented => Way::NotOffered,
        (_, []) if expected(method) == Way::Here => Way::Here,
        (_, [begin, ..]) => match begin.kind {
            1 => Way::Update,
            2 => Way::Create,
            3 => Way::Upsert,
            other => panic!("{}: kind {other}", method.path),
        },
        ([0, 1, 2], []) => Way::All,
        ([_], []) if matches!(method.scope, Scope::Repository { .. }) => Way::AnyReplica,
        ([_], []) => Way::AnyStorage,
        other => panic!("{}: {other:?}", method.path),
    }
}

#[tokio::test]
async fn every_method_goes_where_the_rule_for_its_kind_says() {
    let house = House::new().await;
    let mut counted: BTreeMap<Way, usize> = BTreeMap::new();
    let registry = Registry::read().unwrap();
    let mut methods: Vec<_> = registry.iter().collect();
    methods.sort_by(|one, other| one.path.cmp(&other.path));
    // What goes beside an RPC needs a connection on which a node can ask back; this client has none.
    methods.retain(|method| !method.name.ends_with("WithSidechannel"));
    for (number, method) in methods.into_iter().enumerate() {
        let expected = expected(method);
        let new = format!("new-{number}.git");
        let path = match expected {
            Way::Create => new.as_str(),
            // It is gone afterwards.
            Way::Here => {
                house.coordinator.add(PATH);
                PATH
            }
            _ => REPOSITORY,
        };
        *counted.entry(expected).or_default() += 1;
        let mut seen = call(&house, method, path).await;
        if expected == Way::Primary {
            // Any replica might have been the primary by chance.
            for _ in 0..4 {
                assert_eq!(call(&house, method, path).await, Way::AnyReplica);
            }
            assert!(
                house.nodes[1..].iter().all(|node| node.seen(&method.path).is_empty()),
                "{}",
                method.path
            );
            seen = Way::Primary;
        }
        assert_eq!(seen, expected, "{}", method.path);
    }
    for way in [Way::AnyReplica, Way::Update, Way::Create, Way::Here] {
        assert!(counted[&way] > 5, "{counted:?}");
    }
    assert_eq!((counted[&Way::Primary], counted[&Way::Upsert], counted[&Way::All]), (2, 2, 2), "{counted:?}");
}
