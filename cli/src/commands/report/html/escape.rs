//! Text that is not trusted, on a page.

use std::fmt::{self, Display, Write};

/// Whatever it displays as, as text of HTML, in an element or in an attribute's value in double quotes.
///
/// Characters that are not seen, or that turn the direction of the text around them, are shown as `\u{…}`.
pub(super) struct Text<T>(pub T);

impl<T: Display> Display for Text<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(Escaping(f), "{}", self.0)
    }
}

struct Escaping<'a, 'b>(&'a mut fmt::Formatter<'b>);

impl Write for Escaping<'_, '_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut rest = text;
        while let Some(at) = rest.find(replaced) {
            let (plain, from) = rest.split_at(at);
            self.0.write_str(plain)?;
            let Some(char) = from.chars().next() else { break };
            match char {
                '&' => self.0.write_str("&amp;")?,
                '<' => self.0.write_str("&lt;")?,
                '>' => self.0.write_str("&gt;")?,
                '"' => self.0.write_str("&quot;")?,
                '\'' => self.0.write_str("&#39;")?,
                char => write!(self.0, "{}", char.escape_unicode())?,
            }
            rest = &from[char.len_utf8()..];
        }
        self.0.write_str(rest)
    }
}

fn replaced(char: char) -> bool {
    matches!(char, '&' | '<' | '>' | '"' | '\'')
        || (char.is_control() && char != '\n')
        || is_format(char)
}

/// Whether it is one of Unicode's characters that change the text around them, or that are not seen
/// (Default_Ignorable_Code_Point, and the blank ones that are no space).
fn is_format(char: char) -> bool {
    matches!(
        char,
        '\u{ad}'
            | '\u{34f}'
            | '\u{61c}'
            | '\u{115f}'..='\u{1160}'
            | '\u{17b4}'..='\u{17b5}'
            | '\u{180b}'..='\u{180f}'
            | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}'
            | '\u{2060}'..='\u{206f}'
            | '\u{2800}'
            | '\u{3164}'
            | '\u{fe00}'..='\u{fe0f}'
            | '\u{feff}'
            | '\u{ffa0}'
            | '\u{fff0}'..='\u{fffb}'
            | '\u{1bca0}'..='\u{1bca3}'
            | '\u{1d173}'..='\u{1d17a}'
            | '\u{e0000}'..='\u{e0fff}'
    )
}

/// JSON as it may stand in a `<script>`: nothing in it can end that element, or begin a comment.
///
/// In JSON these characters occur in strings only, where they may be written so.
pub(super) struct Json<'a>(pub &'a str);

impl Display for Json<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut rest = self.0;
        while let Some(at) = rest.find(['<', '>', '&']) {
            let (plain, from) = rest.split_at(at);
            f.write_str(plain)?;
            write!(f, "\\u{:04x}", u32::from(from.as_bytes()[0]))?;
            rest = &from[1..];
        }
        f.write_str(rest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_is_left_that_html_takes_for_its_own() {
        let hostile = "</td><script>alert(\"1\")</script> & 'x'";
        let text = Text(hostile).to_string();
        assert_eq!(
            text,
            "&lt;/td&gt;&lt;script&gt;alert(&quot;1&quot;)&lt;/script&gt; &amp; &#39;x&#39;"
        );
        assert_eq!(Text("plain 0x1000, µs — é").to_string(), "plain 0x1000, µs — é");
        assert_eq!(Text(7).to_string(), "7");
    }

    #[test]
    fn what_is_not_seen_is_shown() {
        assert_eq!(
            Text("a\0b\u{1b}[1m\u{202e}\u{200b}\n").to_string(),
            "a\\u{0}b\\u{1b}[1m\\u{202e}\\u{200b}\n"
        );
        for char in ['\u{e0041}', '\u{3164}', '\u{180e}', '\u{115f}', '\u{fe0f}', '\u{2800}'] {
            assert_eq!(Text(char).to_string(), char.escape_unicode().to_string());
        }
    }

    #[test]
    fn json_cannot_end_its_script_and_says_the_same() {
        let json = r#"{"a":"</script><!-- &lt; "}"#;
        let written = Json(json).to_string();
        assert!(!written.contains(['<', '>', '&']), "{written}");
        let value = |text: &str| serde_json::from_str::<serde_json::Value>(text).unwrap();
        assert_eq!(value(&written), value(json));
    }
}
