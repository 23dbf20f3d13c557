"use strict";
// Draws every figure of the page in the colours of the reader's theme, and again when that changes.
const dark = matchMedia("(prefers-color-scheme: dark)");
const palette = JSON.parse(document.getElementById("palette").textContent);
const config = { displayModeBar: false, responsive: true };

function figureOf(block) {
  let text = block.textContent;
  if (dark.matches) for (const [from, to] of Object.entries(palette)) text = text.replaceAll(from, to);
  return JSON.parse(text);
}

function draw(holder) {
  const figure = figureOf(document.getElementById(holder.id + "-data"));
  const axis = holder.dataset.axis;
  for (const trace of figure.data) {
    if (axis && trace.choices) trace.x = trace.choices[axis];
    delete trace.choices;
  }
  if (axis) figure.layout.xaxis.title.text = axis;
  if (holder.clientWidth < 460) figure.layout.font.size = 11;
  Plotly.react(holder, figure.data, figure.layout, config);
}

const holders = [...document.querySelectorAll(".plot")];
const drawAll = () => holders.forEach(draw);
for (const button of document.querySelectorAll("button[data-for]")) {
  button.addEventListener("click", () => {
    const holder = document.getElementById(button.dataset.for);
    holder.dataset.axis = button.value;
    for (const other of button.parentElement.children) other.setAttribute("aria-pressed", String(other === button));
    draw(holder);
  });
}
dark.addEventListener("change", drawAll);
drawAll();
