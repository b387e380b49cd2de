//! Text in columns, as kubectl prints it.

/// Between two columns.
const GAP: usize = 3;

/// A header and its rows, each column as wide as its widest cell; the last one is not padded.
pub fn render(header: &[&str], rows: &[Vec<String>]) -> String {
    let header: Vec<String> = header.iter().map(|&name| name.to_owned()).collect();
    let width = |column: usize| {
        let cells = std::iter::once(&header).chain(rows).filter_map(|row| row.get(column));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let mut text = String::new();
    for row in std::iter::once(&header).chain(rows) {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            let padding = width + GAP - cell.chars().count();
            line.push_str(cell);
            line.push_str(&" ".repeat(padding));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up_and_lines_end_clean() {
        let rows = [vec!["a".to_owned(), "é".to_owned()], vec!["long name".to_owned(), String::new()]];
        assert_eq!(render(&["NAME", "X"], &rows), "NAME        X\na           é\nlong name\n");
    }
}
