//! `tabularium`: see the library.

use std::process::ExitCode;

#[tokio::main]
async fn main() -> ExitCode {
    tabularium_cli::run().await
}
