//! Compiles the `.proto` sources with protox (no system `protoc`) and generates messages, clients and servers.

use std::{env, fs, path::PathBuf};

use prost::Message as _;

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=gitaly");
    println!("cargo:rerun-if-changed=tabularium");
    let mut sources: Vec<PathBuf> = Vec::new();
    for directory in ["gitaly", "tabularium/coordinator/v1", "tabularium/node/v1"] {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            if path.extension().is_some_and(|extension| extension == "proto") {
                sources.push(path);
            }
        }
    }
    sources.sort();

    let descriptors = protox::compile(&sources, ["."])?;
    let out = PathBuf::from(env::var("OUT_DIR")?);
    fs::write(out.join("descriptors.bin"), descriptors.encode_to_vec())?;

    tonic_prost_build::configure()
        // A method that a server does not write answers UNIMPLEMENTED by itself.
        .generate_default_stubs(true)
        // Pack and blob data: a view into the received buffer instead of a copy.
        .bytes(".gitaly.PostReceivePackRequest.data")
        .bytes(".gitaly.PostReceivePackResponse.data")
        .bytes(".gitaly.InfoRefsResponse.data")
        .bytes(".gitaly.SSHReceivePackRequest.stdin")
        .bytes(".gitaly.SSHReceivePackResponse.stdout")
        .bytes(".gitaly.SSHReceivePackResponse.stderr")
        .bytes(".gitaly.SSHUploadArchiveRequest.stdin")
        .bytes(".gitaly.SSHUploadArchiveResponse.stdout")
        .bytes(".gitaly.SSHUploadArchiveResponse.stderr")
        .bytes(".gitaly.SSHUploadPackRequest.stdin")
        .bytes(".gitaly.SSHUploadPackResponse.stdout")
        .bytes(".gitaly.SSHUploadPackResponse.stderr")
        .bytes(".gitaly.GetBlobResponse.data")
        .bytes(".gitaly.GetArchiveResponse.data")
        .bytes(".gitaly.GetSnapshotResponse.data")
        .bytes(".gitaly.CreateBundleResponse.data")
        .bytes(".gitaly.FetchBundleRequest.data")
        .bytes(".tabularium.node.v1")
        .compile_fds(descriptors)?;
    Ok(())
}
