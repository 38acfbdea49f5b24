//! Whom each code blames: the request, or something around it.

use super::Code;

impl Code {
    /// Whether a fetch that failed with this code may have failed because of the worker's own surroundings: its name
    /// servers, its network, its proxy, its clock and certificates. Any other answer of a host shows that these work.
    pub const fn may_be_ours(self) -> bool {
        matches!(self, Self::Dns | Self::Connect | Self::Tls | Self::Timeout | Self::Http5xx)
    }

    /// Whether what failed with this code may go better later, so that it is tried again. Of `dns` and `tls` some does not,
    /// which the code alone does not tell.
    pub const fn may_pass(self) -> bool {
        matches!(self, Self::Dns | Self::Connect | Self::Tls | Self::Timeout | Self::Http429 | Self::Http5xx)
    }

    /// Whether the request is the cause, so that the same request fails at any time and on any worker: what it asks for
    /// is wrong, missing, forbidden or too much. The others tell of hosts, of the network or of the worker, and a flood of
    /// them is a trouble that may pass.
    pub const fn is_the_inputs(self) -> bool {
        match self {
            Self::BadMessage
            | Self::BadParams
            | Self::BadReference
            | Self::BlockedAddress
            | Self::NotFound
            | Self::AccessDenied
            | Self::Http4xx
            | Self::RobotsOptout
            | Self::TooLarge
            | Self::TooManyPixels
            | Self::UnsupportedMedia
            | Self::Decode
            | Self::OutputTooLarge
            | Self::Quarantined
            // The sender chose it. A worker that is too slow for it shows in its lag.
            | Self::Deadline => true,
            Self::Dns
            | Self::Connect
            | Self::Tls
            | Self::Timeout
            // We ask too much of the host, not the message.
            | Self::Http429
            | Self::Http5xx
            | Self::ModelUnavailable
            | Self::Inference => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_pass_is_what_the_documentation_says_is_retried() {
        let page = include_str!("../../docs/messages.md");
        for code in Code::ALL {
            let start = format!("| `{code}` | ");
            let line = page.lines().find(|line| line.starts_with(&start)).expect("a line for each code");
            let retried = line.trim_end_matches(" |").rsplit(" | ").next().expect("a last cell");
            assert_eq!(retried.starts_with("yes"), code.may_pass(), "{line}");
        }
    }

    #[test]
    fn what_may_be_our_own_fault_is_never_blamed_on_the_input() {
        for code in Code::ALL {
            assert!(!(code.may_be_ours() && code.is_the_inputs()), "{code}");
        }
        assert_eq!(Code::ALL.iter().filter(|code| !code.is_the_inputs()).count(), 8);
    }
}
