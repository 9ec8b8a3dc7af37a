//! What the services say to each other, and nothing else.
//!
//! * [`gitaly`]: Gitaly's public services and messages, number for number those of Gitaly 16.7 and 19.x. Clients of
//!   GitLab speak it to the router, the router speaks it to the nodes.
//! * [`coordinator`]: our control plane. Routers ask where a repository is and record what was written; replicators
//!   take duties and report them; operators look and steer.
//! * [`node`]: what our own storage node offers beyond Gitaly's services.
//!
//! The `.proto` files beside this crate are the contract between processes; no service links another. Generated
//! servers answer `UNIMPLEMENTED` for every method that is not written.

/// Gitaly's services and messages (`proto/gitaly`).
#[allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    unused_qualifications,
    unreachable_pub,
    reason = "generated"
)]
pub mod gitaly {
    tonic::include_proto!("gitaly");
}

/// Our own services, nested as their protobuf packages are.
#[allow(
    missing_docs,
    clippy::all,
    clippy::pedantic,
    unused_qualifications,
    unreachable_pub,
    reason = "generated"
)]
mod tabularium {
    pub mod coordinator {
        pub mod v1 {
            tonic::include_proto!("tabularium.coordinator.v1");
        }
    }
    pub mod node {
        pub mod v1 {
            tonic::include_proto!("tabularium.node.v1");
        }
    }
}

/// The coordinator's control plane (`proto/tabularium/coordinator/v1`).
pub use tabularium::coordinator::v1 as coordinator;
/// Services of the bundled storage node that Gitaly does not have (`proto/tabularium/node/v1`).
pub use tabularium::node::v1 as node;

/// The encoded `FileDescriptorSet` of everything above, for gRPC server reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
