//! Who made a commit or tag, and when: the request's user and time stamp, in the user's time zone.

use jiff::tz::TimeZoneDatabase;
use tabularium_proto::gitaly::{CommitAuthor, User};
use tonic::Status;

/// The offset of no offset.
const GREENWICH: &str = "+0000";

/// A name, an address and a moment as git writes them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Signature {
    pub(super) name: Vec<u8>,
    pub(super) email: Vec<u8>,
    /// As git takes it; seconds since 1970 and zone, unless somebody else has written it.
    date: String,
}

/// Without what would end the name or the line in an object.
fn sanitize(text: &[u8]) -> Vec<u8> {
    text.iter().copied().filter(|byte| !matches!(byte, b'\n' | b'<' | b'>' | 0)).collect()
}

/// The time of a request, or now.
pub(super) fn moment(given: Option<&prost_types::Timestamp>) -> prost_types::Timestamp {
    let now = || prost_types::Timestamp { seconds: jiff::Timestamp::now().as_second(), nanos: 0 };
    given.copied().unwrap_or_else(now)
}

impl Signature {
    /// Of the request's user at the request's time, or now.
    pub(super) fn of_request(
        user: &User,
        timestamp: Option<&prost_types::Timestamp>,
    ) -> Result<Self, Status> {
        let moment = jiff::Timestamp::from_second(moment(timestamp).seconds)
            .map_err(|error| Status::invalid_argument(format!("timestamp: {error}")))?;
        Ok(Self {
            name: sanitize(&user.name),
            email: sanitize(&user.email),
            date: date(moment.as_second(), &offset(&user.timezone, moment)?),
        })
    }

    /// Of a person in a commit. A zone that makes no sense is that of Greenwich.
    pub(super) fn of_author(author: &CommitAuthor) -> Self {
        Self {
            name: sanitize(&author.name),
            email: sanitize(&author.email),
            date: date(
                author.date.as_ref().map_or(0, |date| date.seconds),
                sensible_zone(&author.timezone).unwrap_or(GREENWICH),
            ),
        }
    }

    /// Of a person in a mail, with the mail's date, which git reads; without one, the date of `self`.
    pub(super) fn of_mail(&self, name: &[u8], email: &[u8], date: &str) -> Self {
        let person = self.with_person(name, email);
        if date.is_empty() { person } else { Self { date: date.to_owned(), ..person } }
    }

    /// The same moment, another person.
    pub(super) fn with_person(&self, name: &[u8], email: &[u8]) -> Self {
        Self { name: sanitize(name), email: sanitize(email), ..self.clone() }
    }

    /// For `GIT_AUTHOR_DATE` and `GIT_COMMITTER_DATE`.
    pub(super) fn date(&self) -> &str {
        &self.date
    }

    /// As it stands in a tag.
    pub(super) fn line(&self) -> Vec<u8> {
        let moment = self.date.trim_start_matches('@');
        [self.name.as_slice(), b" <", &self.email, b"> ", moment.as_bytes()].concat()
    }
}

/// The sign makes git take small numbers for seconds too.
fn date(seconds: i64, zone: &str) -> String {
    format!("@{seconds} {zone}")
}

/// `+hhmm`, if it is an offset that there can be.
fn sensible_zone(zone: &[u8]) -> Option<&str> {
    let zone = std::str::from_utf8(zone).ok().filter(|zone| zone.len() == 5)?;
    let digits = zone.strip_prefix(['+', '-'])?;
    let sensible = digits.bytes().all(|byte| byte.is_ascii_digit())
        && digits.get(..2)? <= "24"
        && digits.get(2..)? < "60"
        && zone != "-0000";
    sensible.then_some(zone)
}

/// The offset of a zone at a moment, `+hhmm`. The database is the one compiled in, so that every node agrees.
fn offset(zone: &str, moment: jiff::Timestamp) -> Result<String, Status> {
    if zone.is_empty() || zone == "UTC" {
        return Ok(GREENWICH.to_owned());
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
                .map(|signature| signature.date().to_owned())
        };
        assert_eq!(at("", 0).unwrap(), "@0 +0000");
        assert_eq!(at("Europe/Berlin", 1_700_000_000).unwrap(), "@1700000000 +0100");
        assert_eq!(at("Europe/Berlin", 1_690_000_000).unwrap(), "@1690000000 +0200");
        assert_eq!(at("Asia/Kolkata", 1_700_000_000).unwrap(), "@1700000000 +0530");
        assert_eq!(at("America/St_Johns", 1_700_000_000).unwrap(), "@1700000000 -0330");
        assert_eq!(at("Mars/Olympus", 0).unwrap_err().code(), tonic::Code::InvalidArgument);
    }

    #[test]
    fn zones_of_commits_are_kept_if_they_make_sense() {
        let zone = |zone: &str| {
            let author = CommitAuthor { timezone: zone.into(), ..CommitAuthor::default() };
            Signature::of_author(&author).date().to_owned()
        };
        assert_eq!(zone("-0730"), "@0 -0730");
        for senseless in ["", "+1", "+0060", "+2500", "+12:0", "-0000", "+\u{e9}00", "x1200"] {
            assert_eq!(zone(senseless), "@0 +0000", "{senseless}");
        }
    }

    #[test]
    fn names_cannot_break_out_of_their_line() {
        let signature =
            Signature::of_request(&user(""), Some(&prost_types::Timestamp { seconds: 5, nanos: 0 })).unwrap();
        assert_eq!(signature.line(), b"Jane Doe <j@x> 5 +0000");
    }
}
