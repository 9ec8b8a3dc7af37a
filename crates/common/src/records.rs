//! Records of replicas: what nodes keep beside a replica's files, so that it is known without the database which replica
//! is the newest.

use prost::Message as _;
use tabularium_proto::node::{ExpectedReplica, ReplicaRecord};
use tonic::metadata::{Binary, MetadataValue};

/// Metadata of the answer to a vote: the record of the write that the vote belongs to, as an encoded [`ReplicaRecord`].
pub const WRITE_RECORD: &str = "tabularium-record-bin";

/// Metadata of a request to a node: an encoded [`ExpectedReplica`].
pub const EXPECTED_REPLICA: &str = "tabularium-expected-replica-bin";

/// Metadata of a refusal by a node that was started since what is expected of it was asked for: its instance.
pub const NODE_INSTANCE: &str = "tabularium-node-instance";

/// The value of [`EXPECTED_REPLICA`].
pub fn expectation(expected: &ExpectedReplica) -> MetadataValue<Binary> {
    MetadataValue::from_bytes(&expected.encode_to_vec())
}

/// Whether the replica with this record has missed something of what its repository was at that generation. One that is
/// being made by a copy has no record that says anything.
pub fn is_older(record: &ReplicaRecord, repository_id: i64, generation: i64) -> bool {
    record.complete && record.repository_id == repository_id && record.generation < generation
}

/// How far a replica has come. Replicas of one repository whose records stand at the same place hold the same.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Standing {
    /// Of the last write.
    pub generation: i64,
    /// A write that was settled is newer than what it was before.
    pub settlement: u64,
    /// How much of the last write has been done.
    pub changes: u32,
}

/// Where a record stands among those of its repository.
pub fn standing(record: &ReplicaRecord) -> Standing {
    Standing { generation: record.generation, settlement: record.settlement, changes: record.changes }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_record_of_the_same_repository_tells_that_a_replica_is_older() {
        let record =
            ReplicaRecord { repository_id: 1, generation: 4, complete: true, ..ReplicaRecord::default() };
        assert!(is_older(&record, 1, 5) && !is_older(&record, 1, 4) && !is_older(&record, 2, 5));
        assert!(!is_older(&ReplicaRecord { complete: false, ..record }, 1, 5));
    }

    #[test]
    fn generation_goes_before_settlement_and_that_before_changes() {
        let at = |generation, settlement, changes| {
            standing(&ReplicaRecord { generation, settlement, changes, ..ReplicaRecord::default() })
        };
        let rising = [at(1, 9, 9), at(2, 0, 1), at(2, 0, 2), at(2, 5, 0), at(2, 6, 0), at(3, 0, 0)];
        assert!(rising.is_sorted());
        assert_ne!(at(2, 0, 1), at(2, 0, 2));
    }
}
