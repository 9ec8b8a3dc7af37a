//! Git, and HTTP by hand.

use std::process::Stdio;

use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    process::Command,
};

use crate::stage::Stage;

/// What a git command said.
pub(crate) struct Said {
    pub(crate) ok: bool,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Stage {
    /// A git command with no configuration but its own, in the stage's directory.
    pub(crate) fn git_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new("git");
        command
            .current_dir(self.directory.path())
            .args(arguments)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap())
            .env("HOME", self.directory.path())
            .env("GIT_CONFIG_GLOBAL", self.path("gitconfig"))
            .env("GIT_CONFIG_NOSYSTEM", "1")
            .env("GIT_TERMINAL_PROMPT", "0")
            .env("LC_ALL", "C")
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    }

    pub(crate) async fn try_git(&self, arguments: &[&str]) -> Said {
        let output = self.git_command(arguments).output().await.unwrap();
        Said {
            ok: output.status.success(),
            out: String::from_utf8_lossy(&output.stdout).trim().to_owned(),
            err: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// A git command that succeeds; its output.
    pub(crate) async fn git(&self, arguments: &[&str]) -> String {
        let said = self.try_git(arguments).await;
        assert!(said.ok, "git {arguments:?}: {}", said.err);
        said.out
    }

    /// A repository on the stand-in with `commits` commits, the last of which holds `bytes` that do not compress; and a
    /// work tree `seed` it came from. Answers its tip.
    pub(crate) async fn seed(&self, relative_path: &str, commits: usize, bytes: usize) -> String {
        self.git(&["init", "-q", "seed"]).await;
        for number in 0..commits {
            std::fs::write(self.path("seed/file"), format!("{number}\n")).unwrap();
            if number + 1 == commits && bytes > 0 {
                std::fs::write(self.path("seed/noise"), noise(bytes)).unwrap();
            }
            self.git(&["-C", "seed", "add", "."]).await;
            self.git(&["-C", "seed", "commit", "-q", "-m", &format!("commit {number}")]).await;
        }
        let target = self.fake.path(relative_path);
        self.git(&["clone", "-q", "--bare", "seed", target.to_str().unwrap()]).await;
        self.git(&["-C", "seed", "rev-parse", "HEAD"]).await
    }

    /// An empty repository on the stand-in.
    pub(crate) async fn empty(&self, relative_path: &str) {
        let target = self.fake.path(relative_path);
        self.git(&["init", "-q", "--bare", target.to_str().unwrap()]).await;
    }

    /// Sends bytes as they are, and reads until the gateway closes.
    pub(crate) async fn raw(&self, request: &[u8]) -> Answer {
        Answer::parse(&self.bytes(request).await)
    }

    /// As [`Stage::raw`], for an answer that may have broken off anywhere.
    pub(crate) async fn bytes(&self, request: &[u8]) -> Vec<u8> {
        let mut stream = TcpStream::connect(&self.host).await.unwrap();
        stream.write_all(request).await.unwrap();
        let mut answer = Vec::new();
        // A reset after the answer is no matter here.
        let _ = stream.read_to_end(&mut answer).await;
        answer
    }

    /// One request with `Connection: close`.
    pub(crate) async fn http(&self, method: &str, target: &str, headers: &str, body: &[u8]) -> Answer {
        let mut request =
            format!("{method} {target} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n{headers}", self.host);
        if !body.is_empty() || method == "POST" {
            request.push_str("Content-Length: ");
            request.push_str(&body.len().to_string());
            request.push_str("\r\n");
        }
        request += "\r\n";
        self.raw(&[request.as_bytes(), body].concat()).await
    }
}

/// An HTTP answer.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) head: String,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    fn parse(bytes: &[u8]) -> Self {
        let end = bytes.windows(4).position(|four| four == b"\r\n\r\n").expect("an answer with headers");
        let head = String::from_utf8_lossy(&bytes[..end]).to_lowercase();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        Self { status, head, body: bytes[end + 4..].to_vec() }
    }

    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_slice(&self.body).unwrap()
    }
}

/// Bytes that do not compress, the same every time.
pub(crate) fn noise(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut noise = Vec::with_capacity(bytes + 8);
    while noise.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        noise.extend_from_slice(&state.to_le_bytes());
    }
    noise.truncate(bytes);
    noise
}
