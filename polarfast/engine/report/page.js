"use strict";
// Comfort only: the page says everything without this script.

// A line at the pointer (or moved with the arrow keys) with the values of all runs there.
for (const svg of document.querySelectorAll("svg.curves")) {
  const chart = JSON.parse(svg.dataset.chart);
  const [low, high, left, right] = chart.x;
  const figure = svg.parentElement;
  const samples = document.querySelectorAll(".cards .sample");
  const cross = document.createElementNS("http://www.w3.org/2000/svg", "path");
  cross.setAttribute("class", "cross");
  const box = document.createElement("div");
  box.className = "readout";
  box.setAttribute("role", "status");
  let epoch = null;

  function row(sample, text, value) {
    const line = document.createElement("div");
    if (sample) line.append(sample.cloneNode(true));
    const name = document.createElement("span");
    name.textContent = text;
    const number = document.createElement("b");
    number.textContent = value;
    line.append(name, number);
    return line;
  }

  function show(at) {
    const rows = [];
    epoch = Math.max(Math.ceil(low), Math.min(Math.floor(high), at));
    chart.lines.forEach((line, run) => {
      const value = line && line[2][epoch - line[1]];
      if (value !== null && value !== undefined) {
        rows.push(row(samples[run], chart.lines.length > 1 ? line[0] : "", value + chart.unit));
      }
    });
    if (!rows.length) return hide();
    const x = left + (epoch - low) / (high - low) * (right - left);
    cross.setAttribute("d", `M${x},${chart.y[0]}V${chart.y[1]}`);
    svg.append(cross);
    box.replaceChildren(row(null, "epoch", epoch), ...rows);
    figure.append(box);
    const place = svg.getBoundingClientRect(), outer = figure.getBoundingClientRect();
    const px = place.left - outer.left + x / 400 * place.width;
    const over = px + 12 + box.offsetWidth > outer.width;
    box.style.left = `${over ? Math.max(0, px - 12 - box.offsetWidth) : px + 12}px`;
    box.style.top = `${place.top - outer.top + 24}px`;
  }

  function hide() {
    cross.remove();
    box.remove();
    epoch = null;
  }

  svg.tabIndex = 0;
  svg.addEventListener("pointermove", event => {
    const place = svg.getBoundingClientRect();
    const x = (event.clientX - place.left) / place.width * 400;
    if (x < left - 8 || x > right + 8) return hide();
    show(Math.round(low + (x - left) / (right - left) * (high - low)));
  });
  svg.addEventListener("pointerleave", hide);
  svg.addEventListener("blur", hide);
  svg.addEventListener("keydown", event => {
    const step = {ArrowLeft: -1, ArrowRight: 1, PageUp: 10, PageDown: -10}[event.key];
    if (event.key === "Escape") hide();
    if (!step) return;
    event.preventDefault();
    show(epoch === null ? Math.floor(high) : epoch + step);
  });
}

// Earlier epochs of the histograms of all layers.
const HEIGHTS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz-_";
for (const slider of document.querySelectorAll(".slider")) {
  const data = JSON.parse(slider.querySelector("script").textContent);
  const grid = slider.parentElement.querySelector(".smalls");
  const paths = grid.querySelectorAll(".past");
  const input = slider.querySelector("input"), output = slider.querySelector("output");
  const last = data.epochs.length - 1, width = 126 / data.bins;
  slider.hidden = false;
  input.value = last;
  input.addEventListener("input", () => {
    const index = Number(input.value);
    output.textContent = `epoch ${data.epochs[index]}`;
    grid.classList.toggle("then", index < last);
    paths.forEach((path, layer) => {
      let d = "";
      for (let bin = 0; bin < data.bins; bin++) {
        const height = HEIGHTS.indexOf(data.rows[index][layer * data.bins + bin]) / 63 * 69.6;
        if (height > 0) {
          d += `M${(3 + bin * width).toFixed(2)},74v${-height.toFixed(2)}` +
            `h${width.toFixed(2)}V74z`;
        }
      }
      path.setAttribute("d", d);
    });
  });
}
