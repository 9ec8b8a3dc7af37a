//! What a home site says about one of its repositories: whether it is there, its default branch and its refs.
//!
//! Read from the ref advertisement of git's smart HTTP, streamed: a repository with a million refs costs no memory. An
//! event from the bus only says that there may be something to look at; this is where the truth is read.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use secrecy::{ExposeSecret as _, SecretString};
use tabularium_common::{
    VERSION,
    ids::RelativePath,
    pktline::{self, Packet},
    telemetry::{CORRELATION_ID, CorrelationId},
};

use crate::{failure::Failure, geo_notify::root, http_client::HttpClient, refs::RefsDigest};

/// How long a home site may take to advertise its refs.
const ADVERTISEMENT_TIMEOUT: Duration = Duration::from_secs(60);
/// Largest advertisement read, in bytes: some four million refs.
const MAX_ADVERTISEMENT_BYTES: usize = 256 * 1024 * 1024;

/// A home site, as configured.
pub(crate) struct Home {
    pub(crate) base_url: String,
    pub(crate) token: Option<SecretString>,
}

/// What the home site answered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    /// It has the repository.
    Here(Advertisement),
    /// It has no repository of that name.
    Gone,
    /// It sends its callers elsewhere, as GitLab does after a rename.
    Elsewhere,
}

/// A repository as its home advertises it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Advertisement {
    /// All refs below `refs/`.
    pub(crate) refs: RefsDigest,
    /// Where HEAD points; absent when it points at nothing, or when the server does not say.
    pub(crate) head: Option<String>,
    /// Objects are named by SHA-256.
    pub(crate) sha256: bool,
}

impl Home {
    /// Where git fetches `path`.
    pub(crate) fn repository_url(&self, path: &RelativePath) -> String {
        format!("{}/{}", self.base_url.trim_end_matches('/'), escaped(path.as_str()))
    }

    /// The value of `Authorization`.
    pub(crate) fn authorization(&self) -> Option<String> {
        self.token.as_ref().map(|token| format!("Bearer {}", token.expose_secret()))
    }

    /// Asks for the refs of `path`.
    pub(crate) async fn ask(
        &self,
        client: &HttpClient,
        path: &RelativePath,
        correlation_id: &CorrelationId,
    ) -> Result<Answer, Failure> {
        let request = self.request(path, correlation_id)?;
        let exchange = async {
            let response = client
                .request(request)
                .await
                .map_err(|error| Failure::unreachable(format!("home site not reached: {}", root(&error))))?;
            match response.status() {
                StatusCode::OK => read(response.into_body()).await.map(Answer::Here),
                StatusCode::NOT_FOUND | StatusCode::GONE => Ok(Answer::Gone),
                status if status.is_redirection() => Ok(Answer::Elsewhere),
                status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                    Err(Failure::unreachable(format!("home site answered {status}")))
                }
                status => Err(Failure::refused(format!("home site answered {status}"))),
            }
        };
        tokio::time::timeout(ADVERTISEMENT_TIMEOUT, exchange).await.unwrap_or_else(|_| {
            let seconds = ADVERTISEMENT_TIMEOUT.as_secs();
            Err(Failure::unreachable(format!("home site did not advertise its refs within {seconds} s")))
        })
    }

    fn request(
        &self,
        path: &RelativePath,
        correlation_id: &CorrelationId,
    ) -> Result<Request<Full<Bytes>>, Failure> {
        let mut request =
            Request::get(format!("{}/info/refs?service=git-upload-pack", self.repository_url(path)))
                .header(header::USER_AGENT, format!("git/2.0 (Tabularium {VERSION})"))
                .header(header::ACCEPT, "application/x-git-upload-pack-advertisement");
        if let Some(value) = correlation_id.header() {
            request = request.header(CORRELATION_ID, value);
        }
        if let Some(authorization) = self.authorization() {
            let mut value = header::HeaderValue::from_str(&authorization)
                .map_err(|_| Failure::refused("the home site's token cannot be sent in a header"))?;
            value.set_sensitive(true);
            request = request.header(header::AUTHORIZATION, value);
        }
        request.body(Full::default()).map_err(|error| {
            Failure::refused(format!("the request to the home site cannot be formed: {error}"))
        })
    }
}

/// A path as it stands in a URL: every byte that has a meaning of its own there is escaped.
fn escaped(path: &str) -> String {
    use std::fmt::Write as _;
    let mut escaped = String::with_capacity(path.len());
    for byte in path.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'/' | b'-' | b'.' | b'_' | b'~' | b'@' | b'+') {
            escaped.push(char::from(byte));
        } else {
            // Writing to a string cannot fail.
            let _ = write!(escaped, "%{byte:02X}");
        }
    }
    escaped
}

async fn read(mut body: Incoming) -> Result<Advertisement, Failure> {
    let mut reader = Reader::default();
    let mut buffer = BytesMut::new();
    let mut total = 0_usize;
    while let Some(frame) = body.frame().await {
        let frame =
            frame.map_err(|error| Failure::unreachable(format!("home site broke off: {}", root(&error))))?;
        let Ok(data) = frame.into_data() else { continue };
        total += data.len();
        if total > MAX_ADVERTISEMENT_BYTES {
            return Err(Failure::refused(format!(
                "home site advertises more than {MAX_ADVERTISEMENT_BYTES} bytes of refs"
            )));
        }
        buffer.extend_from_slice(&data);
        while let Some(packet) = pktline::decode(&mut buffer)
            .map_err(|error| Failure::refused(format!("home site's advertisement: {error}")))?
        {
            reader.take(&packet)?;
        }
    }
    reader.finish()
}

/// Takes an advertisement (protocol version 0) apart, a packet at a time.
#[derive(Default)]
struct Reader {
    stage: Stage,
    found: Advertisement,
}

#[derive(Default, PartialEq, Eq)]
enum Stage {
    /// `# service=git-upload-pack` comes first.
    #[default]
    Service,
    /// Then a flush.
    Separator,
    /// Then the first ref, with the capabilities.
    First,
    /// Then the others.
    Others,
    /// Then a flush.
    Done,
}

impl Reader {
    fn take(&mut self, packet: &Packet) -> Result<(), Failure> {
        match (&self.stage, packet) {
            (Stage::Service, Packet::Data(line)) if line.starts_with(b"# service=git-upload-pack") => {
                self.stage = Stage::Separator;
            }
            (Stage::Separator, Packet::Flush) => self.stage = Stage::First,
            (Stage::First, Packet::Data(line)) => {
                let line = line.strip_suffix(b"\n").unwrap_or(line);
                refused(line)?;
                let mut parts = line.splitn(2, |byte| *byte == 0);
                let (first, capabilities) =
                    (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
                self.capabilities(capabilities);
                self.reference(first)?;
                self.stage = Stage::Others;
            }
            (Stage::Others, Packet::Data(line)) => {
                let line = line.strip_suffix(b"\n").unwrap_or(line);
                refused(line)?;
                self.reference(line)?;
            }
            (Stage::First | Stage::Others, Packet::Flush) => self.stage = Stage::Done,
            _ => return Err(Failure::refused("home site's answer is no ref advertisement of git")),
        }
        Ok(())
    }

    fn capabilities(&mut self, capabilities: &[u8]) {
        for capability in capabilities.split(|byte| *byte == b' ') {
            if capability == b"object-format=sha256" {
                self.found.sha256 = true;
            }
            if let Some(target) = capability.strip_prefix(b"symref=HEAD:") {
                self.found.head = String::from_utf8(target.to_vec()).ok();
            }
        }
    }

    fn reference(&mut self, line: &[u8]) -> Result<(), Failure> {
        let space = line.iter().position(|byte| *byte == b' ');
        let Some((object_id, name)) = space.map(|space| (&line[..space], &line[space + 1..])) else {
            return Err(Failure::refused("home site's advertisement has a line that names no ref"));
        };
        // Anything else is HEAD, the stand-in of an empty repository, or a shallow commit. What a tag points at follows
        // the tag.
        if name.starts_with(b"refs/") && !name.ends_with(b"^{}") {
            self.found.refs.add(name, object_id);
        }
        Ok(())
    }

    fn finish(self) -> Result<Advertisement, Failure> {
        if self.stage == Stage::Done {
            Ok(self.found)
        } else {
            Err(Failure::unreachable("home site's advertisement was cut off"))
        }
    }
}

fn refused(line: &[u8]) -> Result<(), Failure> {
    match line.strip_prefix(b"ERR ") {
        Some(text) => Err(Failure::refused(format!("home site: {}", String::from_utf8_lossy(text)))),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "1f0c3e5a7b9d2c4e6f8091a2b3c4d5e6f7081920";

    fn check(lines: &[&str]) -> Result<Advertisement, Failure> {
        let mut reader = Reader::default();
        for line in lines {
            let packet =
                if *line == "0000" { Packet::Flush } else { Packet::Data(Bytes::from((*line).to_owned())) };
            reader.take(&packet)?;
        }
        reader.finish()
    }

    #[test]
    fn an_advertisement_is_read() {
        let found = check(&[
            "# service=git-upload-pack\n",
            "0000",
            &format!("{ID} HEAD\0multi_ack symref=HEAD:refs/heads/main object-format=sha1\n"),
            &format!("{ID} refs/heads/main\n"),
            &format!("{ID} refs/tags/v1\n"),
            &format!("{ID} refs/tags/v1^{{}}\n"),
            "0000",
        ])
        .unwrap();
        let mut refs = RefsDigest::default();
        refs.add(b"refs/tags/v1", ID.as_bytes());
        refs.add(b"refs/heads/main", ID.as_bytes());
        assert_eq!(found, Advertisement { refs, head: Some("refs/heads/main".into()), sha256: false });
    }

    #[test]
    fn an_empty_repository_has_no_refs() {
        let none = "0".repeat(64);
        let found = check(&[
            "# service=git-upload-pack\n",
            "0000",
            &format!("{none} capabilities^{{}}\0object-format=sha256\n"),
            "0000",
        ])
        .unwrap();
        assert_eq!(found, Advertisement { refs: RefsDigest::default(), head: None, sha256: true });
    }

    fn git(directory: &std::path::Path, arguments: &[&str]) -> Vec<u8> {
        let identity = ["-c", "user.name=t", "-c", "user.email=t@t"];
        let output = std::process::Command::new("git")
            .args(identity)
            .args(arguments)
            .current_dir(directory)
            .env_remove("GIT_DIR")
            .env_remove("GIT_PROTOCOL")
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        output.stdout
    }

    #[test]
    fn what_git_advertises_is_what_git_lists() {
        let directory = tempfile::tempdir().unwrap();
        let directory = directory.path();
        git(directory, &["init", "-q", "-b", "trunk"]);
        let advertised = || {
            let mut buffer = BytesMut::new();
            pktline::encode(b"# service=git-upload-pack\n", &mut buffer).unwrap();
            buffer.extend_from_slice(pktline::FLUSH);
            buffer.extend_from_slice(&git(
                directory,
                &["upload-pack", "--stateless-rpc", "--advertise-refs", "."],
            ));
            let mut reader = Reader::default();
            while let Some(packet) = pktline::decode(&mut buffer).unwrap() {
                reader.take(&packet).unwrap();
            }
            assert!(buffer.is_empty());
            reader.finish().unwrap()
        };
        assert_eq!(advertised().refs, RefsDigest::default());
        git(directory, &["commit", "-q", "--allow-empty", "-m", "one"]);
        git(directory, &["tag", "-a", "-m", "two", "v1"]);
        git(directory, &["update-ref", "refs/merge-requests/1/head", "HEAD"]);
        let mut listed = RefsDigest::default();
        let list = git(directory, &["for-each-ref", "--format=%(objectname) %(refname)", "--", "refs/"]);
        for line in String::from_utf8(list).unwrap().lines() {
            let (id, name) = line.split_once(' ').unwrap();
            listed.add(name.as_bytes(), id.as_bytes());
        }
        let advertised = advertised();
        assert_eq!((listed.count, advertised.refs), (3, listed));
        assert_eq!(advertised.head.as_deref(), Some("refs/heads/trunk"));
    }

    #[test]
    fn what_is_no_advertisement_is_refused() {
        assert!(!check(&["<html>"]).unwrap_err().unreachable);
        assert!(
            check(&["# service=git-upload-pack", "0000", "ERR no\n"]).unwrap_err().message.contains("no")
        );
        let cut = check(&["# service=git-upload-pack", "0000", &format!("{ID} refs/heads/a\0\n")]);
        assert!(cut.unwrap_err().message.contains("cut off"));
    }

    #[test]
    fn a_path_stays_a_path_in_a_url() {
        let home = Home { base_url: "https://h/x/".into(), token: None };
        let path: RelativePath = "a b/ü?#.git".parse().unwrap();
        assert_eq!(home.repository_url(&path), "https://h/x/a%20b/%C3%BC%3F%23.git");
    }
}
