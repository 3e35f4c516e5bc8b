//! `key=value,key=value`, as several options take it. A comma of a value is written twice.

/// One of the parts between commas.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Part {
    text: String,
    is_first: bool,
}

impl Part {
    /// What is before the first `=`; all of it where there is none.
    pub(super) fn key(&self) -> &str {
        self.text.split_once('=').map_or(&*self.text, |(key, _)| key)
    }

    /// What is behind the first `=`; nothing where there is none.
    pub(super) fn value(&self) -> &str {
        self.text.split_once('=').map_or("", |(_, value)| value)
    }

    /// The error for a part that is none of `expected`.
    pub(super) fn not_understood(&self, expected: &str) -> String {
        let text = &self.text;
        // What is behind a comma may be the rest of a path.
        let commas = if self.is_first { "" } else { "; a comma in a value is written twice" };
        format!("{text:?} is not understood; expected {expected}{commas}")
    }
}

/// The parts of `text`, one at least.
///
/// # Errors
/// A key is there twice.
pub(super) fn parts(text: &str) -> Result<Vec<Part>, String> {
    /// Stands for a comma of a value: no argument of a program has it.
    const COMMA: &str = "\0";
    let mut parts: Vec<Part> = Vec::new();
    for part in text.replace(",,", COMMA).split(',') {
        let part = Part { text: part.replace(COMMA, ","), is_first: parts.is_empty() };
        if !part.text.is_empty() && parts.iter().any(|other| other.key() == part.key()) {
            return Err(format!(
                "{} is given twice (a comma in a value is written twice)",
                part.key()
            ));
        }
        parts.push(part);
    }
    Ok(parts)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commas_between_and_within() {
        let all = |text: &str| {
            let texts = parts(text).map(|parts| parts.into_iter().map(|part| part.text));
            texts.map(Iterator::collect::<Vec<_>>)
        };
        let strings = |texts: &[&str]| Ok(texts.iter().map(|&text| text.to_owned()).collect());
        assert_eq!(all(""), strings(&[""]));
        assert_eq!(all("a=1,b"), strings(&["a=1", "b"]));
        assert_eq!(all("a=/x,,y,b=,,"), strings(&["a=/x,y", "b=,"]));
        assert_eq!(all("a=/x,,,b=,,,,"), strings(&["a=/x,", "b=,,"]));
        assert_eq!(all("a,"), strings(&["a", ""]));
        for twice in ["a=1,a=2", "a=1,b=2,a", "a,a"] {
            assert!(all(twice).unwrap_err().starts_with("a is given twice"), "{twice}");
        }
    }

    #[test]
    fn a_key_and_a_value() {
        let part = |text: &str| parts(text).unwrap().pop().unwrap();
        assert_eq!((part("a=b=c").key(), part("a=b=c").value()), ("a", "b=c"));
        assert_eq!((part("a").key(), part("a").value()), ("a", ""));
        assert_eq!(part("x=").not_understood("a=N"), "\"x=\" is not understood; expected a=N");
        let error = part("a=/x,y").not_understood("a=N");
        assert!(error.ends_with("expected a=N; a comma in a value is written twice"), "{error}");
    }
}
