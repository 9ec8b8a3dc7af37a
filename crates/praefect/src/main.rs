//! `tabularium-praefect`: see the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    tabularium_praefect::run(std::env::args_os())
}
