//! A table of text, columns as wide as they must be.

/// Formats rows (the first is the head) into aligned columns; numbers, and what looks like them, to the right.
pub(crate) fn format(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let cell = |row: &Vec<String>, column: usize| row.get(column).cloned().unwrap_or_default();
    let numeric = |column: usize| {
        rows.iter().skip(1).all(|row| {
            let text = cell(row, column);
            text.is_empty() || text == "-" || text.starts_with(|c: char| c.is_ascii_digit())
        })
    };
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for column in 0..columns {
            let width = rows.iter().map(|row| cell(row, column).chars().count()).max().unwrap_or(0);
            let gap = if column == 0 { "" } else { "  " };
            if numeric(column) {
                line += &format!("{gap}{:>width$}", cell(row, column));
            } else {
                line += &format!("{gap}{:<width$}", cell(row, column));
            }
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn numbers_stand_right_and_words_left() {
        let rows = [["place", "passed"], ["host", "7"], ["guest 6.1", "120"]];
        let rows: Vec<Vec<String>> =
            rows.iter().map(|row| row.iter().map(ToString::to_string).collect()).collect();
        assert_eq!(super::format(&rows), "place      passed\nhost            7\nguest 6.1     120\n");
    }
}
