//! Keeps credentials and query strings out of error texts.

/// Most characters of a stranger's text in an error.
const QUOTED_CHARS: usize = 60;

/// A text without user-info and query strings, for whatever in it looks like an address.
///
/// An address ends at white space or a quotation mark. Better a little too much is left out than too little.
pub fn redact_text(text: &str) -> String {
    let ends = |c: char| c.is_whitespace() || matches!(c, '"' | '\'' | '`' | '<' | '>' | '“' | '”');
    text.split_inclusive(ends)
        .map(|piece| {
            let (word, end) = match piece.char_indices().next_back() {
                Some((at, last)) if ends(last) => piece.split_at(at),
                _ => (piece, ""),
            };
            redact_word(word) + end
        })
        .collect()
}

fn redact_word(word: &str) -> String {
    let without_user = without_user_info(word);
    let (scheme, rest) = without_user.split_once("://").map_or(("", &*without_user), |(s, r)| (s, r));
    let is_address = !scheme.is_empty();
    let query = rest.find(['?', '#']).filter(|&at| is_address || rest[at..].contains('='));
    match query {
        Some(at) => format!("{}?…", &without_user[..without_user.len() - rest.len() + at]),
        None => without_user,
    }
}

fn without_user_info(word: &str) -> String {
    let (scheme, rest) = word.split_once("://").map_or(("", word), |(s, r)| (&word[..s.len() + 3], r));
    let authority = &rest[..rest.find(['/', '?', '#', '\\']).unwrap_or(rest.len())];
    let cut = if authority.contains('@') {
        authority.rfind('@')
    } else if has_odd_port(authority) {
        // A password with a slash in it: by the letter the authority ends there, but the rest is still a secret.
        rest.rfind('@')
    } else {
        None
    };
    match cut {
        Some(at) if !scheme.is_empty() || rest[..at].contains(':') => format!("{scheme}…@{}", &rest[at + 1..]),
        _ => word.to_owned(),
    }
}

/// `host:something`, where something is not a port.
fn has_odd_port(authority: &str) -> bool {
    let after = authority.rsplit_once(':').map_or("", |(_, port)| port);
    !after.is_empty() && !after.bytes().all(|b| b.is_ascii_digit()) && !authority.starts_with('[')
}

/// A stranger's text for an error: redacted, short, without control characters, between backticks.
pub(super) fn quote(text: &str) -> String {
    // Inline data is not echoed; what stands before the comma says enough.
    let inline = text.get(..5).is_some_and(|scheme| scheme.eq_ignore_ascii_case("data:"));
    let text = if inline { text.split(',').next().unwrap_or(text) } else { text };
    // Four times over, since redacting may shorten what is shown, and never reads megabytes for sixty characters.
    let head: String = text.chars().take(QUOTED_CHARS * 4).collect();
    let shown = without_controls(&redact_text(&head));
    match shown.char_indices().nth(QUOTED_CHARS) {
        Some((at, _)) => format!("`{}…`", &shown[..at]),
        None => format!("`{shown}`"),
    }
}

/// The text with every control character replaced by a space.
pub fn without_controls(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn user_info_and_query_strings_are_left_out_and_the_rest_is_kept() {
        for (text, expected) in [
            ("GET https://h.example/p.jpg?sig=abc failed", "GET https://h.example/p.jpg?… failed"),
            ("https://user:pass@h.example/p", "https://…@h.example/p"),
            ("https://token@h.example/p", "https://…@h.example/p"),
            ("https://user:pa@ss@h.example/p#x", "https://…@h.example/p?…"),
            ("ftp://user:pa/ss@h.example/p", "ftp://…@h.example/p"),
            ("'https://h.example/a?k=v', then `http://u:p@i/`", "'https://h.example/a?…', then `http://…@i/`"),
            ("user:pass@broker:9092", "…@broker:9092"),
            ("/relative?token=1", "/relative?…"),
            ("https://medium.example/@someone/p.jpg", "https://medium.example/@someone/p.jpg"),
            ("https://h.example:8443/p.jpg", "https://h.example:8443/p.jpg"),
            ("what? mail me@example.org: 3 of 4", "what? mail me@example.org: 3 of 4"),
        ] {
            assert_eq!(redact_text(text), expected, "of {text}");
        }
    }

    #[test]
    fn a_quotation_is_short_and_shows_no_inline_data() {
        assert_eq!(quote("data:image/png;base64,AAAA"), "`data:image/png;base64`");
        assert!(quote(&"x".repeat(1000)).chars().count() <= QUOTED_CHARS + 3);
        assert_eq!(quote("a\nb\u{0}c"), "`a b c`");
    }

    proptest! {
        #[test]
        fn secrets_never_survive(user in "[a-z]{3,8}", key in "[a-z]{1,8}", path in "[a-z/]{0,20}") {
            let (password, token) = ("S3CRET", "T0KEN");
            let text = format!("see https://{user}:{password}@host.example/{path}?{key}={token}&b={token} or not");
            let shown = redact_text(&text);
            prop_assert!(!shown.contains(password) && !shown.contains(token), "{}", shown);
            prop_assert!(shown.contains("host.example"), "{}", shown);
            prop_assert!(shown.ends_with(" or not"), "{}", shown);
        }

        #[test]
        fn any_text_is_redacted_and_quoted_without_panic(text in ".{0,200}") {
            prop_assert!(quote(&text).chars().count() <= QUOTED_CHARS + 3);
            let _ = redact_text(&text);
        }
    }
}
