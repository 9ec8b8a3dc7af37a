//! How new the repository is that a client reads or has written: said with every answer, and asked for by those who know
//! of a write that they must not miss.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use http::{HeaderMap, HeaderName, HeaderValue};
use tabularium_common::multiplex::sidechannel;
use tabularium_proto::coordinator::Route;

use super::{
    Relay,
    request::{Call, Named},
};
use crate::{
    limits::{FRESHNESS_PAUSE, MAX_FRESHNESS_WAIT},
    refusal::Refusal,
    routing::{Reader, generation_read},
};

/// With every answer that a replica gave: the generation that it has at least; after a write that of the write.
pub(crate) const GENERATION: HeaderName = HeaderName::from_static("tabularium-generation");
/// Of a read: the generation that has to be there.
const AT_LEAST: HeaderName = HeaderName::from_static("tabularium-at-least-generation");
/// Of a read: how many milliseconds it may wait for that.
const WAIT: HeaderName = HeaderName::from_static("tabularium-wait");
/// Of a read that has a sidechannel: the generation is to be said on that as well, before everything else.
const PREFACE: HeaderName = HeaderName::from_static(sidechannel::generation::ASK);

/// What a client asks for, as it stands in the headers. Nodes do not get it.
#[derive(Debug, Default)]
pub(super) struct Asked {
    at_least: Option<HeaderValue>,
    wait: Option<HeaderValue>,
    /// Whether what comes on the sidechannel has to begin with it.
    pub(super) preface: bool,
}

fn number<T: std::str::FromStr>(name: &'static str, value: &HeaderValue) -> Result<T, Refusal> {
    value.to_str().ok().and_then(|text| text.parse().ok()).ok_or(Refusal::NotANumber(name))
}

impl Asked {
    /// Takes it out of the headers.
    pub(super) fn take(headers: &mut HeaderMap) -> Self {
        Self {
            at_least: headers.remove(AT_LEAST),
            wait: headers.remove(WAIT),
            preface: headers.remove(PREFACE).is_some(),
        }
    }

    fn parse(&self) -> Result<Option<(i64, Duration)>, Refusal> {
        let Some(value) = &self.at_least else { return Ok(None) };
        let wait = self.wait.as_ref().map(|value| number("tabularium-wait", value)).transpose()?;
        let wait = Duration::from_millis(wait.unwrap_or(0)).min(MAX_FRESHNESS_WAIT);
        Ok(Some((number("tabularium-at-least-generation", value)?, wait)))
    }
}

impl Relay {
    /// The route, or a newer one when the client has asked for that. What is not there in time is refused: nobody is given
    /// something older.
    pub(super) async fn fresh_enough(
        &self,
        route: Arc<Route>,
        call: &Call,
        named: Named<'_>,
        reader: Reader,
    ) -> Result<Arc<Route>, Refusal> {
        let Some((wanted, wait)) = call.freshness.parse()? else { return Ok(route) };
        if generation_read(&route, reader) >= wanted {
            return Ok(route);
        }
        let until = Instant::now() + wait;
        let mut pause = FRESHNESS_PAUSE.0;
        loop {
            let routes = &self.shared.routes;
            let route = routes
                .resolve_anew(named.virtual_storage, named.relative_path, Some(&call.correlation))
                .await?;
            let at = generation_read(&route, reader);
            if at >= wanted {
                return Ok(route);
            }
            if Instant::now() + pause > until {
                return Err(Refusal::Behind { at, wanted });
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(FRESHNESS_PAUSE.1);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(
        at_least: Option<&'static str>,
        wait: Option<&'static str>,
    ) -> Result<Option<(i64, u128)>, String> {
        let value = |text: Option<&'static str>| text.map(HeaderValue::from_static);
        let asked = Asked { at_least: value(at_least), wait: value(wait), preface: false };
        let parsed = asked.parse().map_err(|refusal| refusal.to_string())?;
        Ok(parsed.map(|(generation, wait)| (generation, wait.as_millis())))
    }

    #[test]
    fn what_is_asked_for_is_a_number_and_the_wait_is_bounded() {
        assert_eq!(parse(None, Some("x")), Ok(None));
        assert_eq!(parse(Some("7"), None), Ok(Some((7, 0))));
        assert_eq!(parse(Some("7"), Some("250")), Ok(Some((7, 250))));
        assert_eq!(parse(Some("7"), Some("999999999")), Ok(Some((7, MAX_FRESHNESS_WAIT.as_millis()))));
        for (at_least, wait) in
            [("seven", None), ("7", Some("-1")), ("", None), ("99999999999999999999", None)]
        {
            assert!(parse(Some(at_least), wait).is_err(), "{at_least} {wait:?}");
        }
    }
}
