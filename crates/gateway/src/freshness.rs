//! How new a repository is: routers say it with their answers, and a read may ask for no less. Passed on as it stands.

use std::sync::{Arc, OnceLock};

use http::{HeaderMap, HeaderName, HeaderValue};

/// The generation that the answer shows at least; after a push that of the push, if that ends soon after git has begun to
/// say something.
const ANSWERED: HeaderName = HeaderName::from_static("x-tabularium-generation");
/// The same between a router and us.
const TOLD: &str = "tabularium-generation";
/// What clients may ask of a read, and how routers are asked it.
const ASKED: [(&str, HeaderName); 2] = [
    ("x-tabularium-at-least-generation", HeaderName::from_static("tabularium-at-least-generation")),
    ("x-tabularium-wait", HeaderName::from_static("tabularium-wait")),
];

/// Of one request.
#[derive(Debug, Clone, Default)]
pub(crate) struct Freshness {
    asked: HeaderMap,
    generation: Arc<OnceLock<HeaderValue>>,
}

impl Freshness {
    /// What a client asks for.
    pub(crate) fn of(headers: &HeaderMap) -> Self {
        let mut asked = HeaderMap::new();
        for (theirs, ours) in ASKED {
            if let Some(value) = headers.get(theirs) {
                asked.insert(ours, value.clone());
            }
        }
        Self { asked, generation: Arc::default() }
    }

    /// As headers for a router.
    pub(crate) fn asked(&self) -> HeaderMap {
        self.asked.clone()
    }

    /// Notes what a router said.
    pub(crate) fn learn(&self, headers: &HeaderMap) {
        if let Some(value) = headers.get(TOLD) {
            self.generation.get_or_init(|| value.clone());
        }
    }

    /// The same, said otherwise.
    pub(crate) fn note(&self, generation: i64) {
        self.generation.get_or_init(|| HeaderValue::from(generation));
    }

    /// As a header for the client, if a router has said it.
    pub(crate) fn answered(&self) -> Option<(HeaderName, HeaderValue)> {
        self.generation.get().map(|value| (ANSWERED, value.clone()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_but_what_is_asked_is_passed_on() {
        let mut headers = HeaderMap::new();
        headers.insert("x-tabularium-at-least-generation", HeaderValue::from_static("7"));
        headers.insert("tabularium-sync-from-site", HeaderValue::from_static("forged"));
        let freshness = Freshness::of(&headers);
        assert_eq!(freshness.asked().len(), 1);
        assert_eq!(freshness.asked()["tabularium-at-least-generation"], "7");
        assert!(freshness.answered().is_none());
        let told = HeaderMap::from_iter([(HeaderName::from_static(TOLD), HeaderValue::from_static("8"))]);
        freshness.clone().learn(&told);
        assert_eq!(freshness.answered().unwrap().1, "8");
    }
}
