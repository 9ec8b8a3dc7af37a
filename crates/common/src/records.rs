//! Records of replicas: what nodes keep beside a replica's files, so that it is known without the database which replica
//! is the newest.

use tabularium_proto::node::ReplicaRecord;

/// Metadata of the answer to a vote: the record of the write that the vote belongs to, as an encoded [`ReplicaRecord`].
pub const WRITE_RECORD: &str = "tabularium-record-bin";

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
    fn generation_goes_before_settlement_and_that_before_changes() {
        let at = |generation, settlement, changes| {
            standing(&ReplicaRecord { generation, settlement, changes, ..ReplicaRecord::default() })
        };
        let rising = [at(1, 9, 9), at(2, 0, 1), at(2, 0, 2), at(2, 5, 0), at(2, 6, 0), at(3, 0, 0)];
        assert!(rising.is_sorted());
        assert_ne!(at(2, 0, 1), at(2, 0, 2));
    }
}
