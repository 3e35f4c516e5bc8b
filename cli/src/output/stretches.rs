//! Adjacent pages with the same result, as one line.

/// With more pages than this, a burst is summed up instead of listed page by page.
pub(crate) const MANY_PAGES: usize = 32;

/// The first of many lines, and how many more there are.
pub(crate) fn first_of(mut lines: Vec<String>) -> Vec<String> {
    if lines.len() > MANY_PAGES {
        let more = lines.len() - MANY_PAGES;
        lines.truncate(MANY_PAGES);
        lines.push(format!("and so on, {more} more lines; --json has every page"));
    }
    lines
}

/// Merges adjacent pages with the same result, as text: `GPA 0x1000` or `GPA 0x1000..0x3000`.
pub(crate) fn runs<T: PartialEq>(pages: impl Iterator<Item = (u64, T)>) -> Vec<(String, T)> {
    let mut runs: Vec<(u64, u64, T)> = Vec::new();
    for (gpa, what) in pages {
        match runs.last_mut() {
            Some((_, end, same)) if *end == gpa && *same == what => *end += 4096,
            _ => runs.push((gpa, gpa + 4096, what)),
        }
    }
    let words = |(start, end, what)| match (end - start) / 4096 {
        1 => (format!("GPA {start:#x}"), what),
        count => (format!("GPA {start:#x}..{end:#x} ({count} pages)"), what),
    };
    runs.into_iter().map(words).collect()
}
