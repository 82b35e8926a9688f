//! The table that the tests of docs/soundness.md make: what became of each row, by place and mode.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::table;

/// The rows are those of the table for users.
const SOUNDNESS: &str = include_str!("../../../docs/soundness.md");

/// What the tests begin a line with: `memckpt-test-cell: ROW|MODE|OUTCOME`.
const CELL: &str = "memckpt-test-cell: ";

/// What became of one row in one mode.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cell {
    row: u32,
    mode: String,
    outcome: String,
}

/// The cells in the output of a test.
pub(crate) fn cells(output: &str) -> Vec<Cell> {
    let lines = output.lines().filter_map(|line| Some(line.split_once(CELL)?.1));
    let cell = |line: &str| {
        let (row, rest) = line.split_once('|')?;
        let (mode, outcome) = rest.split_once('|')?;
        Some(Cell { row: row.parse().ok()?, mode: mode.to_owned(), outcome: outcome.to_owned() })
    };
    lines.filter_map(cell).collect()
}

/// The cells of all places.
#[derive(Debug, Default)]
pub(crate) struct Cells {
    /// By place and mode, in the order of their arrival.
    columns: Vec<(String, BTreeMap<u32, String>)>,
}

impl Cells {
    pub(crate) fn add(&mut self, place: &str, cells: &[Cell]) {
        for cell in cells {
            let name = format!("{place} {}", cell.mode);
            let at = self.columns.iter().position(|(column, _)| *column == name).unwrap_or_else(|| {
                self.columns.push((name, BTreeMap::new()));
                self.columns.len() - 1
            });
            self.columns[at].1.insert(cell.row, cell.outcome.clone());
        }
    }

    /// The table, with the reasons below it; `None` without a cell.
    pub(crate) fn table(&self) -> Option<String> {
        if self.columns.is_empty() {
            return None;
        }
        let mut reasons: Vec<&str> = Vec::new();
        let mut rows = vec![vec!["row".to_owned()]];
        rows[0].extend((1..=self.columns.len()).map(|number| format!("[{number}]")));
        for row in self.rows() {
            let mut line = vec![row.to_string()];
            for (_, column) in &self.columns {
                line.push(match column.get(&row) {
                    None => "EMPTY".to_owned(),
                    Some(outcome) => match outcome.strip_prefix("cannot: ") {
                        None => outcome.clone(),
                        Some(reason) => {
                            let at = reasons.iter().position(|known| *known == reason).unwrap_or_else(|| {
                                reasons.push(reason);
                                reasons.len() - 1
                            });
                            format!("cannot ({})", (b'a' + at as u8) as char)
                        }
                    },
                });
            }
            rows.push(line);
        }
        let mut text = table::format(&rows);
        for (number, (name, _)) in (1..).zip(&self.columns) {
            text += &format!("[{number}] {name}\n");
        }
        for (letter, reason) in ('a'..).zip(reasons) {
            text += &format!("({letter}) {reason}\n");
        }
        Some(text)
    }

    /// Rows that have no cell in a column that has any.
    pub(crate) fn empty(&self) -> Vec<String> {
        let rows = self.rows();
        let missing = self.columns.iter().flat_map(|(name, column)| {
            let missing = rows.iter().filter(|row| !column.contains_key(row));
            missing.map(move |row| format!("row {row}, {name}: nothing tells what becomes of it"))
        });
        missing.collect()
    }

    fn rows(&self) -> BTreeSet<u32> {
        let documented = SOUNDNESS
            .lines()
            .filter_map(|line| line.strip_prefix("| ")?.split_once(' ')?.0.parse::<u32>().ok());
        documented.chain(self.columns.iter().flat_map(|(_, column)| column.keys().copied())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_without_a_cell_is_missed() {
        let output = "test x ... memckpt-test-cell: 1|uffd-wp|tracked\nmemckpt-test-cell: 18|uffd-wp|cannot: no swap\nok\n";
        let cells = cells(output);
        let told: Vec<_> = cells.iter().map(|cell| (cell.row, cell.outcome.as_str())).collect();
        assert_eq!(told, [(1, "tracked"), (18, "cannot: no swap")]);
        let mut all = Cells::default();
        assert_eq!((all.table(), all.empty()), (None, vec![]));
        all.add("host", &cells);
        assert_eq!(all.rows(), (1..=36).collect(), "the rows of docs/soundness.md");
        assert_eq!(all.empty().len(), 34);
        let table = all.table().unwrap();
        assert!(table.contains("18  cannot (a)"), "{table}");
        assert!(table.contains("[1] host uffd-wp\n(a) no swap\n"), "{table}");
    }
}
