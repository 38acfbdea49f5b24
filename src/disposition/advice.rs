//! What each code means, and what a person can do about it. `docs/messages.md` has the same words for the meanings.

use super::Code;

impl Code {
    /// What happened, in half a sentence.
    pub const fn meaning(self) -> &'static str {
        match self {
            Self::BadMessage => "the value is in none of the four forms, or a field has a wrong type",
            Self::BadParams => "`params`, `prompt`, `tasks`, `text` or `questions` are wrong or out of range",
            Self::BadReference => "the image reference is unreadable or of an unknown scheme",
            Self::BlockedAddress => "the address is not public, or its port unusual, and no setting opens it",
            Self::Dns => "the host name does not resolve",
            Self::Connect => "no connection, or it broke; a store that does not accept the worker",
            Self::Tls => "the TLS handshake failed",
            Self::Timeout => "a time limit passed",
            Self::NotFound => "404 or 410, or no such file",
            Self::AccessDenied => "401, 403 or 451, or a file or an object that may not be read",
            Self::Http4xx => "any other 4xx",
            Self::Http429 => "429: the host asked for fewer requests; a `Retry-After` is kept to",
            Self::Http5xx => "5xx: the host failed",
            Self::RobotsOptout => "the host opted out of machine use",
            Self::TooLarge => {
                "the body is over `fetch.max_body`, or the message over `kafka.max_message_size` with key and headers"
            }
            Self::TooManyPixels => "the picture is over `decode.max_pixels` or `decode.max_side`",
            Self::UnsupportedMedia => "not an image, or not JPEG, PNG, WebP, GIF, BMP or TIFF",
            Self::Decode => "the image is broken",
            Self::Deadline => "the request's `deadline` passed",
            Self::ModelUnavailable => "no loaded model serves the request",
            Self::Inference => "the model failed on this image alone; its neighbours in the batch are not blamed",
            Self::OutputTooLarge => "the caption record is over the topic's limit",
            Self::Quarantined => "the message ended its worker before",
        }
    }

    /// What a person can do about it, in a sentence or two.
    pub const fn advice(self) -> &'static str {
        match self {
            Self::BadMessage => {
                "Mend the producer and send a new request; a replay of the same bytes fails again. docs/messages.md \
                 shows the four forms."
            }
            Self::BadParams => {
                "Mend the producer and send a new request, or raise model.max_new_tokens_limit, model.sequences_limit, \
                 filter.texts_limit or answerer.questions_limit if that is what it is over, and replay."
            }
            Self::BadReference => {
                "Mend the reference and send a new request: http, https, file and data addresses and base64 are read."
            }
            Self::BlockedAddress => {
                "If the workers are meant to reach this host, add its network to fetch.allow_networks, or its port to \
                 fetch.allow_ports, and replay; if not, ask who sent the request."
            }
            Self::Dns => {
                "Check the host's spelling; if it resolves on the worker's machine by now, replay, else mend the \
                 worker's name servers."
            }
            Self::Connect => {
                "See whether the host can be reached from the worker's machine (firewall, proxy, host down); replay \
                 when it can."
            }
            Self::Tls => {
                "See whether the host's certificate is valid and its name the right one; replay when the host has \
                 mended it."
            }
            Self::Timeout => {
                "Replay when the host is quicker, or raise fetch.total_timeout, fetch.read_timeout or \
                 fetch.connect_timeout before."
            }
            Self::NotFound => "Replay once the image is there; until then it fails again.",
            Self::AccessDenied => {
                "Give the workers access, or send a new request with a fresh address if it was a signed one that has \
                 expired; for a file, see its permissions and fetch.file_roots; for an object, the worker's credentials \
                 and fetch.stores."
            }
            Self::Http4xx => {
                "The host refuses the request as it is: open the address by hand, and send a new request with one that \
                 works."
            }
            Self::Http429 => "Lower fetch.per_host, and replay slowly: `dlq replay --rate` with few a second.",
            Self::Http5xx => "Replay when the host has recovered.",
            Self::RobotsOptout => "The host's wish is respected: ask its owner for permission, or take another image.",
            Self::TooLarge => "Send a smaller image, or raise fetch.max_body and replay.",
            Self::TooManyPixels => {
                "Send a smaller image, or raise decode.max_pixels, decode.max_side and with them decode.max_memory, \
                 and replay."
            }
            Self::UnsupportedMedia => {
                "Open the address by hand: it may be a web page, or a format to be converted. Send a new request for \
                 an image that is supported."
            }
            Self::Decode => "Open the image by hand; replay if it was mended, or broken on its way.",
            Self::Deadline => {
                "A replay fails again, since the deadline is in the request: send a new one with a later deadline, and \
                 see whether the workers keep up."
            }
            Self::ModelUnavailable => {
                "Start workers with the model that the request asks for (filter.source for the tasks filter and embed, \
                 answerer.source for the task answer), and replay."
            }
            Self::Inference => {
                "Replay once; if it fails again, please report it with the image. The worker's log has the error."
            }
            Self::OutputTooLarge => {
                "Shorten the request's `meta`, `text` or `questions`, or ask for fewer tokens or captions in a new request, or raise \
                 kafka.max_message_size and the topic's max.message.bytes, and replay."
            }
            Self::Quarantined => {
                "Do not replay it to workers that matter: it ended one before. Look at the image, try it alone with \
                 `blipstream caption`, and report it."
            }
        }
    }
}
