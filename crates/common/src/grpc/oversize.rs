//! What clients hear of a message that is too large.

use http::Response;
use tonic::{Code, Status};

use super::MAX_MESSAGE_BYTES;

/// How tonic puts it.
const FOUND: &str = "decoded message length too large: found ";

/// Says of a message that is too large what grpc-go says, whose code and text Gitaly's clients know. For answers that are
/// nothing but a status.
pub fn say_as_gitaly_does<B>(mut response: Response<B>) -> Response<B> {
    let Some(status) = Status::from_header_map(response.headers()) else { return response };
    if status.code() != Code::OutOfRange {
        return response;
    }
    let Some((_, found)) = status.message().split_once(FOUND) else { return response };
    let bytes: String = found.chars().take_while(char::is_ascii_digit).collect();
    let text = format!("grpc: received message larger than max ({bytes} vs. {MAX_MESSAGE_BYTES})");
    // Both are written over; the text is plain, so nothing can go wrong with it.
    if Status::resource_exhausted(text).add_header(response.headers_mut()).is_err() {
        tracing::debug!("a status was not replaced");
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(status: &Status) -> (Code, String) {
        let mut response = Response::new(());
        status.add_header(response.headers_mut()).unwrap();
        let response = say_as_gitaly_does(response);
        let heard = Status::from_header_map(response.headers()).unwrap();
        (heard.code(), heard.message().to_owned())
    }

    #[test]
    fn only_what_is_said_of_a_size_is_said_otherwise() {
        let tonics =
            "Error, decoded message length too large: found 5242999 bytes, the limit is: 4194304 bytes";
        assert_eq!(
            heard(&Status::out_of_range(tonics)),
            (
                Code::ResourceExhausted,
                "grpc: received message larger than max (5242999 vs. 4194304)".to_owned()
            )
        );
        let own = Status::out_of_range("line 7 is not there");
        assert_eq!(heard(&own), (Code::OutOfRange, own.message().to_owned()));
    }
}
