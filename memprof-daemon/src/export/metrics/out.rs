//! Metrics of one value or of a family, as the library's encoder wants them.

use std::{fmt, time::Duration};

use prometheus_client::{
    encoding::{DescriptorEncoder, EncodeGaugeValue, EncodeLabelValue, EncodeMetric},
    metrics::{counter::ConstCounter, gauge::ConstGauge},
};

/// Writes descriptors with their values.
pub(super) struct Out<'a>(pub(super) DescriptorEncoder<'a>);

impl Out<'_> {
    fn one(&mut self, name: &str, help: &str, metric: &impl EncodeMetric) -> fmt::Result {
        let encoder = self
            .0
            .encode_descriptor(name, help, None, metric.metric_type())?;
        metric.encode(encoder)
    }

    pub(super) fn gauge(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.one(name, help, &ConstGauge::new(value))
    }

    pub(super) fn gauge_f64(&mut self, name: &str, help: &str, value: Duration) -> fmt::Result {
        self.one(name, help, &ConstGauge::new(value.as_secs_f64()))
    }

    pub(super) fn counter(&mut self, name: &str, help: &str, value: u64) -> fmt::Result {
        self.one(name, help, &ConstCounter::new(value))
    }

    pub(super) fn counter_f64(&mut self, name: &str, help: &str, value: Duration) -> fmt::Result {
        self.one(name, help, &ConstCounter::new(value.as_secs_f64()))
    }

    pub(super) fn counters<L, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        series: impl IntoIterator<Item = ([(&'static str, L); N], u64)>,
    ) -> fmt::Result
    where
        L: EncodeLabelValue,
    {
        let series = series.into_iter();
        let series = series.map(|(labels, value)| (labels, ConstCounter::new(value)));
        self.family(name, help, series)
    }

    pub(super) fn gauges<L, V, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        series: impl IntoIterator<Item = ([(&'static str, L); N], V)>,
    ) -> fmt::Result
    where
        L: EncodeLabelValue,
        V: EncodeGaugeValue,
    {
        let series = series.into_iter();
        let series = series.map(|(labels, value)| (labels, ConstGauge::new(value)));
        self.family(name, help, series)
    }

    /// Writes nothing, not even a name, for a family without series.
    fn family<L, M, const N: usize>(
        &mut self,
        name: &str,
        help: &str,
        series: impl Iterator<Item = ([(&'static str, L); N], M)>,
    ) -> fmt::Result
    where
        L: EncodeLabelValue,
        M: EncodeMetric,
    {
        let mut series = series.peekable();
        let Some((_, first)) = series.peek() else {
            return Ok(());
        };
        let mut encoder = self
            .0
            .encode_descriptor(name, help, None, first.metric_type())?;
        for (labels, metric) in series {
            metric.encode(encoder.encode_family(&labels)?)?;
        }
        Ok(())
    }
}
