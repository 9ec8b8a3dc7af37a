//! Owner of repository placement in Postgres.
