//! Remotes outside the cluster: which are allowed, and how git is told about one without its secrets being visible.

use std::net::IpAddr;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use tabularium_common::tls;
use tonic::Status;

use crate::git::GitCommand;

/// The name under which git knows the remote of one command.
pub(crate) const REMOTE: &str = "inmemory";
/// Transports that may be used. `file` and `ext` would reach into this machine.
const PROTOCOLS: &str = "http:https:ssh:git";

/// A remote's address, without its password.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RemoteUrl {
    /// As git gets it.
    url: String,
    /// Taken from the address, if it had user and password.
    basic: Option<String>,
}

impl RemoteUrl {
    /// Checks an address from a request.
    pub(crate) fn parse(text: &str) -> Result<Self, Status> {
        let refused =
            || Status::invalid_argument("remote URL: allowed are http://, https://, ssh:// and git://");
        if text.chars().any(|c| c.is_control() || c == ' ') {
            return Err(refused());
        }
        let (scheme, rest) = text.split_once("://").ok_or_else(refused)?;
        let scheme = scheme.to_ascii_lowercase();
        if !PROTOCOLS.split(':').any(|allowed| allowed == scheme) {
            return Err(refused());
        }
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        // `ssh://-oProxyCommand=…` would be read as an option by what git starts.
        let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
        if host.is_empty() || host.starts_with('-') || authority.starts_with('-') {
            return Err(refused());
        }
        match authority.rsplit_once('@') {
            Some((user, host)) if scheme.starts_with("http") => {
                let user = percent_decode(user);
                let basic = if user.contains(&b':') { user } else { [user.as_slice(), b":"].concat() };
                Ok(Self {
                    url: format!("{scheme}://{host}{path}"),
                    basic: Some(format!("Basic {}", STANDARD.encode(basic))),
                })
            }
            // Nobody asks for this password, but git would print it.
            Some((user, host)) => {
                let user = user.split_once(':').map_or(user, |(user, _)| user);
                Ok(Self { url: format!("{scheme}://{user}@{host}{path}"), basic: None })
            }
            None => Ok(Self { url: format!("{scheme}://{rest}"), basic: None }),
        }
    }

    /// As git gets it, by the address to be used for its host, if there is one.
    pub(crate) fn address(&self, resolved_address: &str) -> Result<String, Status> {
        let resolved = match resolved_address {
            "" => None,
            given => Some(parse_address(given)?),
        };
        let (scheme, rest) = self.url.split_once("://").unwrap_or_default();
        match resolved {
            // Certificates are for the name, so the name stays.
            None => Ok(self.url.clone()),
            Some(_) if scheme.starts_with("http") => Ok(self.url.clone()),
            Some(address) => {
                let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
                let (user, host) = match authority.rsplit_once('@') {
                    Some((user, host)) => (format!("{user}@"), host),
                    None => (String::new(), authority),
                };
                let port = split_port(host).1.map(|port| format!(":{port}")).unwrap_or_default();
                let address = match address {
                    IpAddr::V4(address) => address.to_string(),
                    IpAddr::V6(address) => format!("[{address}]"),
                };
                Ok(format!("{scheme}://{user}{address}{port}{path}"))
            }
        }
    }

    /// By which name SSH is to know the host's key when it connects to an address instead.
    pub(crate) fn host_key_alias(&self, resolved_address: &str) -> Option<&str> {
        let host = split_port(self.authority().rsplit('@').next().unwrap_or_default()).0;
        let plain =
            host.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_'));
        (!resolved_address.is_empty() && self.url.starts_with("ssh://") && plain).then_some(host)
    }

    fn authority(&self) -> &str {
        let rest = self.url.split_once("://").map_or("", |(_, rest)| rest);
        rest.split('/').next().unwrap_or_default()
    }

    /// Tells a git command about the remote, named [`REMOTE`]. All of it goes through the environment.
    pub(crate) fn configure(
        &self,
        command: GitCommand,
        authorization: &str,
        resolved_address: &str,
    ) -> Result<GitCommand, Status> {
        let mut command = command
            .env("GIT_ALLOW_PROTOCOL", PROTOCOLS)
            .config("http.followRedirects=false")
            .secret_config(format!("remote.{REMOTE}.url"), self.address(resolved_address)?);
        if let Some(authorities) = tls::ca_path() {
            command = command.config(format!("http.sslCAInfo={}", authorities.display()));
        }
        let authorization = match authorization {
            "" => self.basic.as_deref().unwrap_or_default(),
            given => given,
        };
        if authorization.contains(['\n', '\r', '\0']) {
            return Err(Status::invalid_argument("the authorization header cannot be sent"));
        }
        if !authorization.is_empty() {
            command = command.secret_config(
                format!("http.{}.extraHeader", self.url),
                format!("Authorization: {authorization}"),
            );
        }
        if !resolved_address.is_empty() && self.url.starts_with("http") {
            let pinned = self.pin(parse_address(resolved_address)?);
            command = command.secret_config("http.curloptResolve", pinned);
        }
        Ok(command)
    }

    /// `host:port:address`, as curl takes it.
    fn pin(&self, address: IpAddr) -> String {
        let default_port = if self.url.starts_with("https://") { "443" } else { "80" };
        let (host, port) = split_port(self.authority());
        format!("{host}:{}:{address}", port.unwrap_or(default_port))
    }
}

fn parse_address(text: &str) -> Result<IpAddr, Status> {
    text.parse().map_err(|_| Status::invalid_argument("resolved address is not an IP address"))
}

/// `host:port`, or only the host.
fn split_port(authority: &str) -> (&str, Option<&str>) {
    match authority.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|byte| byte.is_ascii_digit()) => (host, Some(port)),
        _ => (authority, None),
    }
}

fn percent_decode(text: &str) -> Vec<u8> {
    let bytes = text.as_bytes();
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut index = 0;
    while index < bytes.len() {
        let code = bytes.get(index + 1..index + 3).and_then(|digits| std::str::from_utf8(digits).ok());
        match (bytes[index], code.and_then(|digits| u8::from_str_radix(digits, 16).ok())) {
            (b'%', Some(byte)) => {
                decoded.push(byte);
                index += 3;
            }
            (byte, _) => {
                decoded.push(byte);
                index += 1;
            }
        }
    }
    decoded
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_remotes_over_the_network_are_allowed() {
        for url in ["http://h/a.git", "https://h:8443/a.git", "ssh://git@h/a.git", "git://h/a", "HTTP://h/a"]
        {
            assert!(RemoteUrl::parse(url).is_ok(), "{url}");
        }
        for url in [
            "file:///etc",
            "/srv/a.git",
            "../a.git",
            "ext::sh -c id",
            "ext::sh://x",
            "h:a.git",
            "fd::3",
            "http://",
            "ssh://-oProxyCommand=id/a",
            "ssh://-x@h/a",
            "http://h/a\nb",
            "--upload-pack=id",
            "",
        ] {
            assert_eq!(RemoteUrl::parse(url).unwrap_err().code(), tonic::Code::InvalidArgument, "{url}");
        }
    }

    #[test]
    fn a_password_leaves_the_address() {
        let url = RemoteUrl::parse("https://user:p%40ss@host:444/a.git").unwrap();
        assert_eq!(url.url, "https://host:444/a.git");
        assert_eq!(url.basic.as_deref(), Some("Basic dXNlcjpwQHNz"));
        assert_eq!(url.pin("10.0.0.1".parse().unwrap()), "host:444:10.0.0.1");
        assert_eq!(RemoteUrl::parse("ssh://git:secret@h:22/a").unwrap().url, "ssh://git@h:22/a");
        assert_eq!(RemoteUrl::parse("http://h/a").unwrap().pin("::1".parse().unwrap()), "h:80:::1");
    }

    #[test]
    fn an_address_that_has_been_resolved_is_used() {
        let at = |url: &str, resolved| RemoteUrl::parse(url).unwrap().address(resolved).unwrap();
        for (url, resolved, address) in [
            ("https://h/a", "10.0.0.1", "https://h/a"),
            ("ssh://git@h:22/a/b", "10.0.0.1", "ssh://git@10.0.0.1:22/a/b"),
            ("ssh://h/a", "::1", "ssh://[::1]/a"),
            ("git://h/a", "10.0.0.1", "git://10.0.0.1/a"),
            ("git://h/a", "", "git://h/a"),
        ] {
            assert_eq!(at(url, resolved), address, "{url} {resolved}");
        }
        let url = RemoteUrl::parse("ssh://git@h:22/a").unwrap();
        assert_eq!(url.address("h2").unwrap_err().code(), tonic::Code::InvalidArgument);
        assert_eq!((url.host_key_alias("10.0.0.1"), url.host_key_alias("")), (Some("h"), None));
        assert_eq!(RemoteUrl::parse("ssh://h$x/a").unwrap().host_key_alias("10.0.0.1"), None);
    }
}
