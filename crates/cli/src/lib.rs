//! The command line of operators, and whole clusters on one machine.
//!
//! The binary `tabularium` is for people: it asks the services over the same gRPC that they use among each other and
//! prints tables or JSON. The library half, [`local`], starts real processes of every service with a Postgres and a
//! NATS server of their own; `tabularium up` and the tests of the other crates share it, so that what the tests run is
//! what people run.
//!
//! It must not know SQL (only the coordinator does; `sql-ping` and `sql-migrate` run the coordinator's binary), nor
//! link a service: it meets them in `proto/`, in their configuration files and in their announcements.
//!
//! Run the tests with `cargo test -p tabularium-cli`; those of whole clusters are in `crates/testkit`.

pub mod local;
