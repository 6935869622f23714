//! An answer on its way to the terminal: as a stream of settled text, or as the blocks being
//! unmasked, drawn in place. Tokens of a block come in any order; text is only text from the left.

use std::time::{Duration, Instant};

use anyhow::Result;
use console::{Style, measure_text_width};
use demask_engine::decode::Event;
use demask_engine::model::{Tokenizer, tokenizer::TokenStream};

use crate::ui;

/// Stands for one open position.
const HOLE: &str = "░";

/// Turns events into text that will not change any more.
pub struct Stream<'a> {
    decoder: TokenStream<'a>,
    /// From position `next` on, as far as known.
    ahead: Vec<Option<u32>>,
    /// Position of the first token that is not part of the text yet.
    next: usize,
    eos_ids: &'a [u32],
    stopped: bool,
}

impl<'a> Stream<'a> {
    /// The text behind `prompt`. The decoder reads the prompt too: the first word of an answer
    /// keeps its blank, and a character may begin in the prompt and end in the answer.
    pub fn new(tokenizer: &'a Tokenizer, prompt: &[u32], eos_ids: &'a [u32]) -> Self {
        let mut decoder = tokenizer.stream(true);
        prompt.iter().for_each(|&id| drop(decoder.push(id)));
        Stream { decoder, ahead: Vec::new(), next: prompt.len(), eos_ids, stopped: false }
    }

    /// What this event adds to the text.
    pub fn hear(&mut self, event: &Event) -> String {
        if let Event::Committed { position, token, .. } = *event {
            let at = position - self.next;
            self.ahead.resize(self.ahead.len().max(at + 1), None);
            self.ahead[at] = Some(token);
        }
        let known = self.ahead.iter().take_while(|t| t.is_some()).count();
        self.next += known;
        let mut text = String::new();
        for id in self.ahead.drain(..known).flatten() {
            self.stopped |= self.eos_ids.contains(&id);
            if !self.stopped {
                text += &self.decoder.push(id).unwrap_or_default();
            }
        }
        text
    }

    /// The rest: a character that ends inside.
    pub fn finish(self) -> String {
        self.decoder.finish().unwrap_or_default()
    }
}

/// The whole answer as [`Stream`] gives it in pieces.
pub fn answer_text(tokenizer: &Tokenizer, prompt: &[u32], answer: &[u32]) -> String {
    let mut stream = Stream::new(tokenizer, prompt, &[]);
    let mut text = String::new();
    for (i, &token) in answer.iter().enumerate() {
        let position = prompt.len() + i;
        text += &stream.hear(&Event::Committed { position, token, confidence: 1.0, pass: 0 });
    }
    text + &stream.finish()
}

/// A token's own text; bytes that are no whole character appear as U+FFFD.
pub fn token_text(tokenizer: &Tokenizer, id: u32) -> String {
    match tokenizer.token_bytes(id) {
        Some(bytes) if !tokenizer.is_special(id) => String::from_utf8_lossy(bytes).into_owned(),
        _ => tokenizer.id_to_token(id).unwrap_or_default(),
    }
}

/// Text that may go to a terminal: a model must not steer it by escape sequences.
pub fn harmless(text: &str) -> String {
    let safe = |c: char| if c.is_control() && c != '\n' { '\u{FFFD}' } else { c };
    text.replace('\t', "    ").chars().map(safe).collect()
}

/// One position of the answer.
#[derive(Clone, Copy)]
enum Cell {
    Open,
    Filled(u32, f32),
}

/// Draws the open block in place behind the text so far. Colours tell the model's confidence.
pub struct Live<'a> {
    tokenizer: &'a Tokenizer,
    block_length: usize,
    /// Length of prompt and answer.
    total: usize,
    /// First position of the open block, and its cells.
    start: usize,
    cells: Vec<Cell>,
    /// The last line of what is settled, with colours; the drawing begins at its first column.
    line: String,
    /// Rows that the last drawing took.
    rows: usize,
    columns: usize,
    /// Least time between passes, so that an eye can follow a fast device.
    pace: Duration,
    pass: Option<(usize, Instant)>,
    waited: Duration,
}

impl<'a> Live<'a> {
    /// Begins behind `line`, the last line of the prompt, which must be on the screen already.
    pub fn new(
        tokenizer: &'a Tokenizer,
        line: &str,
        block_length: usize,
        [prompt, total]: [usize; 2],
        pace: Duration,
    ) -> Self {
        ui::hide_cursor();
        let columns = ui::columns();
        let mut live = Live {
            tokenizer,
            block_length,
            total,
            start: prompt,
            cells: Vec::new(),
            line: line.to_owned(),
            rows: n_rows(line, columns),
            columns,
            pace,
            pass: None,
            waited: Duration::ZERO,
        };
        live.open(prompt);
        live
    }

    /// Time spent waiting for the eye.
    pub fn waited(&self) -> Duration {
        self.waited
    }

    fn open(&mut self, start: usize) {
        self.start = start;
        let end = (start / self.block_length + 1) * self.block_length;
        self.cells = vec![Cell::Open; end.min(self.total).saturating_sub(start)];
    }

    /// Draws what this event changes.
    pub fn hear(&mut self, event: &Event) -> Result<()> {
        match *event {
            Event::Committed { position, token, confidence, pass } => {
                self.keep_pace(pass);
                if let Some(cell) = self.cells.get_mut(position - self.start) {
                    *cell = Cell::Filled(token, confidence);
                }
                self.draw()
            }
            Event::BlockDone { end, .. } => {
                self.cells.truncate(end - self.start);
                self.draw()?;
                self.line += &self.render();
                let last = self.line.rfind('\n').map_or(0, |at| at + 1);
                self.line.drain(..last);
                self.rows = n_rows(&self.line, self.columns);
                self.open(end);
                self.draw()
            }
            Event::Finished { .. } => {
                self.cells.clear();
                self.draw()
            }
            Event::Prefilled { .. } | Event::Proposed { .. } => Ok(()),
        }
    }

    fn keep_pace(&mut self, pass: usize) {
        let now = Instant::now();
        match self.pass {
            Some((last, _)) if last == pass => return,
            Some((_, since)) => {
                let rest = self.pace.saturating_sub(now - since);
                std::thread::sleep(rest);
                self.waited += rest;
            }
            None => {}
        }
        self.pass = Some((pass, Instant::now()));
    }

    fn draw(&mut self) -> Result<()> {
        let text = format!("{}{}", self.line, self.render());
        let up = match self.rows {
            0 | 1 => String::new(),
            rows => format!("\x1b[{}A", rows - 1),
        };
        self.rows = n_rows(&text, self.columns);
        ui::print(&format!("{up}\r\x1b[J{text}"))
    }

    fn render(&self) -> String {
        let mut text = String::new();
        // A character may take several tokens.
        let mut bytes = Vec::new();
        for (i, cell) in self.cells.iter().enumerate() {
            let Cell::Filled(id, confidence) = *cell else {
                text += &Style::new().dim().apply_to(HOLE).to_string();
                continue;
            };
            if self.tokenizer.is_special(id) {
                text += &Style::new().dim().apply_to("∎").to_string();
                continue;
            }
            bytes.extend_from_slice(self.tokenizer.token_bytes(id).unwrap_or_default());
            let goes_on = matches!(self.cells.get(i + 1), Some(Cell::Filled(..)));
            let unfinished = std::str::from_utf8(&bytes).is_err_and(|e| e.error_len().is_none());
            if !(goes_on && unfinished) {
                let whole = harmless(&String::from_utf8_lossy(&bytes));
                text += &coloured(&whole, confidence);
                bytes.clear();
            }
        }
        text
    }
}

impl Drop for Live<'_> {
    fn drop(&mut self) {
        ui::restore_cursor();
    }
}

/// Plain where the model was sure, yellow where it hesitated, red where it guessed. Line by line,
/// so that no colour runs over a line's end.
fn coloured(text: &str, confidence: f32) -> String {
    let style = match confidence {
        c if c >= 0.9 => return text.to_owned(),
        c if c >= 0.5 => Style::new().yellow(),
        _ => Style::new().red(),
    };
    let line = |line: &str| match line.is_empty() {
        true => String::new(),
        false => style.apply_to(line).to_string(),
    };
    text.split('\n').map(line).collect::<Vec<_>>().join("\n")
}

/// What the colours mean, for a caption.
pub fn legend() -> String {
    if !console::colors_enabled() {
        return format!("{HOLE} not known yet");
    }
    format!(
        "{HOLE} not known yet   plain: at least 90 % sure   {}   {}",
        Style::new().yellow().apply_to("yellow: 50 %"),
        Style::new().red().apply_to("red: less"),
    )
}

fn n_rows(text: &str, columns: usize) -> usize {
    text.split('\n').map(|line| measure_text_width(line).div_ceil(columns).max(1)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_of_a_drawing() {
        assert_eq!(n_rows("", 10), 1);
        assert_eq!(n_rows("0123456789", 10), 1);
        assert_eq!(n_rows("0123456789a\n", 10), 3);
        assert_eq!(n_rows("\x1b[31mred\x1b[0m", 3), 1);
    }

    #[test]
    fn escape_sequences_are_defused() {
        assert_eq!(harmless("a\tb\nc\x1b[2J\r"), "a    b\nc\u{FFFD}[2J\u{FFFD}");
    }
}
