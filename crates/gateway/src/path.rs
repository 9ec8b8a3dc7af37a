//! What a request asks for, read from its method and target alone.

use http::{Method, Uri};
use percent_encoding::percent_decode_str;
use tabularium_common::ids::{MAX_RELATIVE_PATH_BYTES, ParseIdError, RelativePath};

use crate::limits::MAX_URI_BYTES;

/// Where the JSON API is. A repository whose path starts with `api/` could not be told from it and cannot be created.
const API: &str = "/api/";
/// What the name of every repository ends in.
const SUFFIX: &str = ".git";
const REPOSITORIES: &str = "/api/v1/repositories";

/// What a repository that is created here may be called.
pub(crate) const ALLOWED_PATHS: &str = "one or more names with '/' between them; a name has ASCII letters, digits, \
     '-', '_' and '.', starts with a letter, a digit or '_', and does not end in '.', '.lock' or (before a '/') '.git'; \
     the first one is not 'api'";

/// The two halves of git's protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum GitService {
    /// Fetch, clone.
    UploadPack,
    /// Push.
    ReceivePack,
}

impl GitService {
    /// As it stands in URLs and content types.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::UploadPack => "git-upload-pack",
            Self::ReceivePack => "git-receive-pack",
        }
    }

    fn of(name: &str) -> Option<Self> {
        [Self::UploadPack, Self::ReceivePack].into_iter().find(|service| service.name() == name)
    }
}

/// A repository by the path in its URL. The same with and without `.git` at its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RepositoryPath(RelativePath);

impl RepositoryPath {
    /// From decoded text. Leading, doubled and trailing slashes do not count.
    pub(crate) fn parse(text: &str) -> Result<Self, ParseIdError> {
        let text = text.trim_matches('/');
        let name = text.strip_suffix(SUFFIX).unwrap_or(text);
        if name.is_empty() || name.ends_with('/') {
            return Err(ParseIdError::Empty);
        }
        // The suffix would hide a `..` at the end.
        name.parse::<RelativePath>()?;
        Ok(Self(format!("{name}{SUFFIX}").parse()?))
    }

    /// As the cluster knows it: with `.git`.
    pub(crate) fn relative_path(&self) -> &str {
        self.0.as_str()
    }

    /// As people know it: without `.git`.
    pub(crate) fn name(&self) -> &str {
        self.0.as_str().strip_suffix(SUFFIX).unwrap_or(self.0.as_str())
    }

    /// Whether a repository of this name may be created here. Stricter than what is served: repositories that came
    /// into the cluster by other ways keep their names.
    pub(crate) fn may_be_created(&self) -> bool {
        let name = self.name();
        name.split('/').next() != Some("api")
            && self.0.as_str().len() <= MAX_RELATIVE_PATH_BYTES
            && name.split('/').all(is_plain_name)
    }
}

fn is_plain_name(name: &str) -> bool {
    let starts_well = name.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
    let plain = name.bytes().all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.'));
    let ends_well = ![".", ".lock", ".git"].iter().any(|end| name.ends_with(end));
    starts_well && plain && ends_well
}

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Route {
    /// `GET …/info/refs?service=…`
    Advertise(RepositoryPath, GitService),
    /// `POST …/git-upload-pack`, `POST …/git-receive-pack`
    Exchange(RepositoryPath, GitService),
    /// `POST /api/v1/repositories`
    Create,
    /// `GET /api/v1/repositories`
    List,
    /// `GET /api/v1/repositories/<path>`
    Show(RepositoryPath),
    /// `DELETE /api/v1/repositories/<path>`
    Remove(RepositoryPath),
}

impl Route {
    /// For the log and the metrics.
    pub(crate) const fn label(&self) -> &'static str {
        match self {
            Self::Advertise(_, service) | Self::Exchange(_, service) => service.name(),
            Self::Create | Self::List | Self::Show(_) | Self::Remove(_) => "api",
        }
    }
}

/// Why a request asks for nothing that is served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RouteError {
    #[error("the request target is longer than {MAX_URI_BYTES} bytes")]
    UriTooLong,
    #[error("the path is not valid percent-encoded UTF-8")]
    Encoding,
    #[error("bad repository path: {0}")]
    Path(#[from] ParseIdError),
    #[error(
        "git's dumb HTTP protocol is not served; use a git client that speaks the smart one (1.6.6 or newer)"
    )]
    Dumb,
    #[error("service {0:?} is not served; allowed: git-upload-pack, git-receive-pack")]
    Service(String),
    #[error("only {0} is allowed here")]
    Method(&'static str),
    #[error("nothing is served at this path")]
    Unknown,
}

/// Reads method and target.
pub(crate) fn route(method: &Method, uri: &Uri) -> Result<Route, RouteError> {
    let query = uri.query().unwrap_or_default();
    if uri.path().len() + query.len() > MAX_URI_BYTES {
        return Err(RouteError::UriTooLong);
    }
    let path = percent_decode_str(uri.path()).decode_utf8().map_err(|_| RouteError::Encoding)?;
    if path.starts_with(API) {
        return api_route(method, &path);
    }
    if let Some(repository) = path.strip_suffix("/info/refs") {
        return advertise_route(method, repository, query);
    }
    let Some((repository, last)) = path.rsplit_once('/') else { return Err(RouteError::Unknown) };
    match GitService::of(last) {
        Some(service) => {
            let repository = RepositoryPath::parse(repository)?;
            allow(method, &Method::POST, "POST")?;
            Ok(Route::Exchange(repository, service))
        }
        None if last == "HEAD" || path.contains("/objects/") => Err(RouteError::Dumb),
        None => Err(RouteError::Unknown),
    }
}

fn advertise_route(method: &Method, repository: &str, query: &str) -> Result<Route, RouteError> {
    let repository = RepositoryPath::parse(repository)?;
    allow(method, &Method::GET, "GET")?;
    let service = query_value(query, "service").ok_or(RouteError::Dumb)?;
    match GitService::of(&service) {
        Some(service) => Ok(Route::Advertise(repository, service)),
        None => Err(RouteError::Service(service)),
    }
}

fn api_route(method: &Method, path: &str) -> Result<Route, RouteError> {
    let rest = path.strip_prefix(REPOSITORIES).ok_or(RouteError::Unknown)?;
    if rest.is_empty() || rest == "/" {
        return match *method {
            Method::GET => Ok(Route::List),
            Method::POST => Ok(Route::Create),
            _ => Err(RouteError::Method("GET, POST")),
        };
    }
    let repository = RepositoryPath::parse(rest.strip_prefix('/').ok_or(RouteError::Unknown)?)?;
    match *method {
        Method::GET => Ok(Route::Show(repository)),
        Method::DELETE => Ok(Route::Remove(repository)),
        _ => Err(RouteError::Method("GET, DELETE")),
    }
}

fn allow(method: &Method, wanted: &Method, name: &'static str) -> Result<(), RouteError> {
    if method == wanted { Ok(()) } else { Err(RouteError::Method(name)) }
}

/// The first value of a key in a query string.
pub(crate) fn query_value(query: &str, key: &str) -> Option<String> {
    form_urlencoded::parse(query.as_bytes())
        .find(|(name, _)| name == key)
        .map(|(_, value)| value.into_owned())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn of(method: &Method, target: &str) -> Result<Route, RouteError> {
        route(method, &target.parse().unwrap())
    }

    fn repository(text: &str) -> RepositoryPath {
        RepositoryPath::parse(text).unwrap()
    }

    #[test]
    fn a_repository_is_the_same_with_and_without_its_suffix() {
        let expected = Ok(Route::Advertise(repository("group/project"), GitService::UploadPack));
        for target in [
            "/group/project.git/info/refs?service=git-upload-pack",
            "/group/project/info/refs?service=git-upload-pack",
            "//group//project.git/info/refs?x=1&service=git-upload-pack",
            "/group%2Fproject/info/refs?service=git%2dupload-pack",
        ] {
            assert_eq!(of(&Method::GET, target), expected, "{target}");
        }
        assert_eq!(repository("group/project").relative_path(), "group/project.git");
        assert_eq!(repository("group/project.git").name(), "group/project");
        assert_eq!(
            of(&Method::POST, "/p/git-receive-pack"),
            Ok(Route::Exchange(repository("p"), GitService::ReceivePack))
        );
    }

    #[test]
    fn paths_that_leave_the_storage_or_hold_controls_are_refused() {
        for (target, expected) in [
            ("/../etc/info/refs?service=git-upload-pack", ParseIdError::Escapes),
            ("/a/%2e%2e/b.git/info/refs?service=git-upload-pack", ParseIdError::Escapes),
            ("/a/..%2fb.git/info/refs?service=git-upload-pack", ParseIdError::Escapes),
            ("/../info/refs?service=git-upload-pack", ParseIdError::Escapes),
            ("/a/...git/info/refs?service=git-upload-pack", ParseIdError::Escapes),
            ("/a%00b.git/info/refs?service=git-upload-pack", ParseIdError::Control),
            ("/a%0ab.git/info/refs?service=git-upload-pack", ParseIdError::Control),
            ("/info/refs?service=git-upload-pack", ParseIdError::Empty),
        ] {
            assert_eq!(of(&Method::GET, target), Err(RouteError::Path(expected)), "{target}");
        }
        assert_eq!(of(&Method::GET, "/a%ff/info/refs"), Err(RouteError::Encoding));
        let long = format!("/{}/info/refs?service=git-upload-pack", "a/".repeat(3000));
        assert_eq!(of(&Method::GET, &long), Err(RouteError::UriTooLong));
        let long = format!("/{}/info/refs?service=git-upload-pack", "a/".repeat(1000));
        assert!(matches!(of(&Method::GET, &long), Err(RouteError::Path(ParseIdError::TooLong { .. }))));
    }

    #[test]
    fn what_is_not_served_is_told_apart() {
        assert_eq!(of(&Method::GET, "/a.git/info/refs"), Err(RouteError::Dumb));
        assert_eq!(of(&Method::GET, "/a.git/HEAD"), Err(RouteError::Dumb));
        assert_eq!(of(&Method::GET, "/a.git/objects/info/packs"), Err(RouteError::Dumb));
        assert_eq!(
            of(&Method::GET, "/a.git/info/refs?service=git-upload-archive"),
            Err(RouteError::Service("git-upload-archive".into()))
        );
        assert_eq!(of(&Method::GET, "/a.git/git-upload-pack"), Err(RouteError::Method("POST")));
        assert_eq!(of(&Method::POST, "/a.git/info/refs"), Err(RouteError::Method("GET")));
        assert_eq!(of(&Method::GET, "/"), Err(RouteError::Unknown));
        assert_eq!(of(&Method::GET, "/api/v1/other"), Err(RouteError::Unknown));
        assert_eq!(of(&Method::PUT, REPOSITORIES), Err(RouteError::Method("GET, POST")));
        assert_eq!(of(&Method::GET, "/api/v1/repositories/a/b"), Ok(Route::Show(repository("a/b"))));
    }

    #[test]
    fn names_for_new_repositories_are_plain() {
        for good in ["a", "group/project", "Group/sub.dir/_x-1.2", "a.b"] {
            assert!(repository(good).may_be_created(), "{good}");
        }
        for bad in ["api/x", "-a", "a/.b", "a b", "a.lock", "a.git/b", "@hashed/a", "a/b.", "ä", "a\\b"] {
            assert!(!repository(bad).may_be_created(), "{bad}");
        }
    }

    proptest! {
        #[test]
        fn no_path_ever_escapes(text in "[a./%2eEfF0\\\\ ]{0,40}") {
            if let Ok(path) = RepositoryPath::parse(&text) {
                prop_assert!(path.relative_path().split('/').all(|part| part != ".." && !part.is_empty()));
                prop_assert!(path.relative_path().strip_suffix(SUFFIX).is_some_and(|name| !name.ends_with('/')));
            }
        }
    }
}
