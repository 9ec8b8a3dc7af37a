//! HTTP endpoint that makes events of other sites durable.
