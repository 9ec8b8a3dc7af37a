//! Printing figures and judging them by their bars.

/// What a figure must reach.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Bar {
    /// At most this.
    AtMost(f64),
    /// At least this.
    AtLeast(f64),
    /// For the reader only.
    Told,
}

/// The figures of one run.
#[derive(Debug, Default)]
pub(crate) struct Figures {
    short: usize,
}

impl Figures {
    /// None yet.
    pub(crate) fn new() -> Self {
        Self::default()
    }

    /// Prints a figure: `name value bar ok|short`.
    pub(crate) fn print(&mut self, name: &str, value: f64, bar: Bar) {
        let (bar, reached) = match bar {
            Bar::AtMost(limit) => (format!("<={limit}"), value <= limit),
            Bar::AtLeast(limit) => (format!(">={limit}"), value >= limit),
            Bar::Told => ("-".to_owned(), true),
        };
        if !reached {
            self.short += 1;
        }
        println!("{name} {value:.3} {bar} {}", if reached { "ok" } else { "short" });
    }

    /// No figure was short.
    pub(crate) fn all_reached(&self) -> bool {
        self.short == 0
    }
}

/// The median; NaN of nothing, which no bar accepts.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_over_its_bar_makes_the_run_short() {
        let mut figures = Figures::new();
        figures.print("a", 1.0, Bar::AtMost(1.0));
        figures.print("b", 9.0, Bar::Told);
        assert!(figures.all_reached());
        figures.print("d", 1.0, Bar::AtLeast(1.0));
        assert!(figures.all_reached());
        figures.print("c", f64::NAN, Bar::AtMost(1.0));
        assert!(!figures.all_reached(), "what could not be measured was not reached");
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert!((median(vec![3.0, 1.0, 2.0]) - 2.0).abs() < f64::EPSILON);
    }
}
