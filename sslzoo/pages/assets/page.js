"use strict";
// Draws every chart of the page, in the colours of its style sheet, at the width of its place.
(() => {
  const specs = JSON.parse(document.getElementById("charts").textContent);
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const faded = (name) => colour(name) + "38";
  const number = (value, digits = 4) => {
    if (value == null) return "–";
    const size = Math.abs(value);
    if (size >= 1e5 || (size > 0 && size < 1e-3)) return value.toExponential(digits - 3);
    return String(Number(value.toPrecision(digits)));
  };
  const steps = (value) => (value >= 1e6 ? value / 1e6 + " M" : value >= 1e4 ? value / 1e3 + " k" : String(value));
  // Of ticks, with as many digits as tell them apart.
  const labels = (ticks) => {
    for (let digits = 4; ; digits += 1) {
      const texts = ticks.map((value) => (value == null ? "" : number(value, digits)));
      const shown = texts.filter(Boolean);
      if (digits === 9 || new Set(shown).size === shown.length) return texts;
    }
  };
  // The value under the pointer; without a pointer, the last one of the curve, which may end before others.
  const legend = (chart, value, index) =>
    number(value ?? (chart.cursor.idx == null ? chart.data[index].findLast((v) => v != null) : null));
  const HEIGHT = 210;

  // Across the whole width, also where curves have a single point.
  const drawLevels = (chart) => {
    const { ctx, bbox } = chart;
    for (const line of chart.series) {
      if (line.level == null || !line.show) continue;
      const y = chart.valToPos(line.level, "y", true);
      ctx.save();
      ctx.strokeStyle = line.stroke();
      ctx.lineWidth = line.width * devicePixelRatio;
      ctx.setLineDash(line.dash.map((length) => length * devicePixelRatio));
      ctx.beginPath();
      ctx.moveTo(bbox.left, y);
      ctx.lineTo(bbox.left + bbox.width, y);
      ctx.stroke();
      ctx.restore();
    }
  };
  // As uPlot does it, but percentages do not go on beyond 0 and 100.
  const range = (percent) => (_, min, max) => {
    if (min == null) return [null, null];
    const [low, high] = uPlot.rangeNum(min, max, 0.1, true);
    return percent ? [min < 0 ? low : Math.max(low, 0), max > 100 ? high : Math.min(high, 100)] : [low, high];
  };
  // Of the vertical axis: room for its longest label.
  const room = (chart, texts, index, cycle) => {
    const axis = chart.axes[index];
    if (cycle > 1) return axis._size;
    chart.ctx.font = axis.font[0];
    const widths = (texts || []).map((text) => chart.ctx.measureText(text).width / devicePixelRatio);
    return Math.ceil(Math.max(45, ...widths.map((width) => width + axis.ticks.size + axis.gap)));
  };

  const options = (spec, width) => {
    const series = [{ label: spec.xLabel, value: (_, v) => (v == null ? "–" : v.toLocaleString("en")) }];
    const data = [spec.x];
    const bands = [];
    spec.series.forEach((line) => {
      const name = `--c${line.colour % 10}`;
      const sparse = line.y.filter((v) => v != null).length <= 40;
      series.push({
        label: line.label, stroke: () => colour(name), width: 2, spanGaps: true, value: legend,
        points: { show: sparse, size: 5, fill: () => colour(name) },
      });
      data.push(line.y);
      if (line.low.length) {
        for (const edge of [line.high, line.low]) {
          series.push({ label: "", class: "edge", stroke: "transparent", width: 0, spanGaps: true, points: { show: false } });
          data.push(edge);
        }
        bands.push({ series: [series.length - 2, series.length - 1], fill: () => faded(name) });
      }
    });
    spec.levels.forEach((level, i) => {
      series.push({
        label: level.label, stroke: () => colour(i % 2 ? "--ink" : "--soft"), dash: [[7, 5], [2, 4], [10, 3, 2, 3]][i % 3],
        width: 1.3, points: { show: false }, value: () => number(level.y), paths: () => null, level: level.y,
      });
      data.push(spec.x.map(() => level.y));
    });
    const axis = (extra) => ({
      stroke: () => colour("--soft"), grid: { stroke: () => colour("--grid"), width: 1 },
      ticks: { stroke: () => colour("--grid"), width: 1 }, font: "12px system-ui, sans-serif", ...extra,
    });
    const dashes = series.map((line) => (line.dash ? (line.dash.length === 4 ? "double" : line.dash[0] > 4 ? "dashed" : "dotted") : "solid"));
    return [{
      legend: { markers: { dash: (_, i) => dashes[i] } }, width, height: HEIGHT, series, bands, hooks: { draw: [drawLevels] }, cursor: { sync: { key: "step" }, drag: { x: true, y: false } },
      scales: { x: { time: false }, y: spec.log ? { distr: 3 } : { range: range(spec.percent) } },
      axes: [axis({ values: (_, ticks) => ticks.map(steps), space: 60 }),
             axis({ size: room, values: (_, ticks) => labels(ticks) })],
    }, data];
  };

  const charts = [];
  for (const place of document.querySelectorAll("[data-chart]")) {
    const [opts, data] = options(specs[place.dataset.chart], place.clientWidth);
    const chart = new uPlot(opts, data, place);
    const last = specs[place.dataset.chart].x.length - 1;
    const rest = () => chart.setLegend({ idx: last });  // the last values, unless the pointer asks for others
    setTimeout(rest);
    chart.over.addEventListener("mouseleave", rest);
    chart.root.querySelectorAll(".edge").forEach((row) => row.remove());
    charts.push([place, chart]);
  }
  const fit = (width) => {
    for (const [place, chart] of charts) chart.setSize({ width: width || place.clientWidth, height: HEIGHT });
  };
  const redraw = () => charts.forEach(([, chart]) => chart.redraw(false, true));
  let pending = 0;
  addEventListener("resize", () => {
    cancelAnimationFrame(pending);
    pending = requestAnimationFrame(() => fit());
  });
  matchMedia("screen and (prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("beforeprint", () => fit(310));
  addEventListener("afterprint", () => fit());
})();
