//! Who made a commit or tag, and when: the request's user and time stamp, in the user's time zone.

use jiff::tz::TimeZoneDatabase;
use tabularium_proto::gitaly::User;
use tonic::Status;

/// A name, an address and a moment as git writes them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Signature {
    pub(super) name: Vec<u8>,
    pub(super) email: Vec<u8>,
    seconds: i64,
    zone: String,
}

/// Without what would end the name or the line in an object.
fn sanitize(text: &[u8]) -> Vec<u8> {
    text.iter().copied().filter(|byte| !matches!(byte, b'\n' | b'<' | b'>' | 0)).collect()
}

impl Signature {
    /// Of the request's user at the request's time, or now.
    pub(super) fn of_request(
        user: &User,
        timestamp: Option<&prost_types::Timestamp>,
    ) -> Result<Self, Status> {
        let moment = match timestamp {
            Some(given) => jiff::Timestamp::from_second(given.seconds)
                .map_err(|error| Status::invalid_argument(format!("timestamp: {error}")))?,
            None => jiff::Timestamp::now(),
        };
        Ok(Self {
            name: sanitize(&user.name),
            email: sanitize(&user.email),
            seconds: moment.as_second(),
            zone: offset(&user.timezone, moment)?,
        })
    }

    /// The same moment, another person.
    pub(super) fn with_person(&self, name: &[u8], email: &[u8]) -> Self {
        Self { name: sanitize(name), email: sanitize(email), ..self.clone() }
    }

    /// For `GIT_AUTHOR_DATE` and `GIT_COMMITTER_DATE`; the sign makes git take small numbers for seconds too.
    pub(super) fn date(&self) -> String {
        format!("@{} {}", self.seconds, self.zone)
    }

    /// As it stands in an object.
    pub(super) fn line(&self) -> Vec<u8> {
        let date = format!("> {} {}", self.seconds, self.zone);
        [self.name.as_slice(), b" <", &self.email, date.as_bytes()].concat()
    }
}

/// The offset of a zone at a moment, `+hhmm`. The database is the one compiled in, so that every node agrees.
fn offset(zone: &str, moment: jiff::Timestamp) -> Result<String, Status> {
    if zone.is_empty() || zone == "UTC" {
        return Ok("+0000".to_owned());
    }
    let zone = TimeZoneDatabase::bundled()
        .get(zone)
        .map_err(|_| Status::invalid_argument(format!("unknown time zone {zone}")))?;
    let seconds = zone.to_offset(moment).seconds();
    let sign = if seconds < 0 { '-' } else { '+' };
    let minutes = seconds.unsigned_abs() / 60;
    Ok(format!("{sign}{:02}{:02}", minutes / 60, minutes % 60))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(timezone: &str) -> User {
        User {
            name: b"Jane <Doe>\n".to_vec(),
            email: b"j@x".to_vec(),
            timezone: timezone.into(),
            ..User::default()
        }
    }

    #[test]
    fn the_users_zone_at_that_time() {
        let at = |zone: &str, seconds| {
            Signature::of_request(&user(zone), Some(&prost_types::Timestamp { seconds, nanos: 7 }))
                .map(|s| s.date())
        };
        assert_eq!(at("", 0).unwrap(), "@0 +0000");
        assert_eq!(at("Europe/Berlin", 1_700_000_000).unwrap(), "@1700000000 +0100");
        assert_eq!(at("Europe/Berlin", 1_690_000_000).unwrap(), "@1690000000 +0200");
        assert_eq!(at("Asia/Kolkata", 1_700_000_000).unwrap(), "@1700000000 +0530");
        assert_eq!(at("America/St_Johns", 1_700_000_000).unwrap(), "@1700000000 -0330");
        assert_eq!(at("Mars/Olympus", 0).unwrap_err().code(), tonic::Code::InvalidArgument);
    }

    #[test]
    fn names_cannot_break_out_of_their_line() {
        let signature =
            Signature::of_request(&user(""), Some(&prost_types::Timestamp { seconds: 5, nanos: 0 })).unwrap();
        assert_eq!(signature.line(), b"Jane Doe <j@x> 5 +0000");
    }
}
