"use strict";
// The sample browser. Texts are hostile: they only ever become text nodes.
(() => {
  const element = (id) => document.getElementById(id);
  if (!element("data")) return;
  const { samples, layers, heads, best, scale } = JSON.parse(element("data").textContent);
  const view = {
    filter: "all",
    shown: samples,
    at: 0,
    block: best ? best[0] : layers.length - 1,
    head: best ? best[1] : 0,
    token: null,
  };
  const ALL = null; // of the answer's tokens

  const create = (tag, text, properties = {}) =>
    Object.assign(document.createElement(tag), { textContent: text }, properties);
  const visible = (text) => text.trim() || (text ? "␣" : "·");
  const percent = (weight) => `${((100 * weight) / scale).toFixed(1)} %`;

  // Weights of the context's tokens, 1 being `scale`: of one token of the answer, or their mean.
  function weights(sample, block, token) {
    const rows = sample.weights[block][view.head];
    const sum = new Float64Array(sample.tokens.length);
    const chosen = token === ALL ? rows : [rows[token]];
    for (const row of chosen)
      for (let i = 0; i < row.length; i += 2) sum[row[i]] += row[i + 1] / chosen.length;
    return sum;
  }

  function filter() {
    const words = element("search").value.trim().toLowerCase();
    view.shown = samples.filter(
      (s) =>
        (view.filter === "all" || s.right === (view.filter === "right")) &&
        [s.question, s.context, s.answer, ...s.gold].some((text) => text.toLowerCase().includes(words)),
    );
    view.at = 0;
    show();
  }

  function show() {
    const count = view.shown.length;
    element("none").hidden = count > 0;
    element("sample").hidden = count === 0;
    element("position").textContent = count ? `${view.at + 1} / ${count}` : "0 / 0";
    element("previous").disabled = view.at === 0;
    element("next").disabled = view.at >= count - 1;
    if (!count) return;
    const sample = view.shown[view.at];
    view.token = ALL;
    element("verdict").textContent = sample.right ? "✓ right" : "✗ wrong";
    element("verdict").className = sample.right ? "right" : "wrong";
    element("meta").textContent = [
      sample.class.replaceAll("_", " "),
      sample.tokens && `${sample.tokens.length} tokens of context`,
      sample.id,
    ]
      .filter(Boolean)
      .join(" · ");
    element("question").textContent = sample.question;
    element("answer").textContent = sample.answer || "(nothing)";
    element("gold").textContent = sample.gold.join(" | ");
    element("others").replaceChildren(
      ...Object.entries(sample.others).flatMap(([name, text]) => [
        create("dt", name.replaceAll("_", " ")),
        create("dd", text || "(nothing)", { dir: "auto" }),
      ]),
    );
    element("others").parentElement.hidden = Object.keys(sample.others).length === 0;
    const tokens = (sample.tokens ?? [sample.context]).map((text, i) =>
      create("span", text, { className: sample.marked?.includes(i) ? "mark" : "" }),
    );
    element("context").replaceChildren(...tokens);
    element("answer-tokens").replaceChildren(
      ...[["whole answer", ALL], ...(sample.answer_tokens ?? []).map((text, i) => [visible(text), i])].map(
        ([text, token]) => {
          const button = create("button", text, { type: "button" });
          button.addEventListener("click", () => {
            view.token = token;
            shade();
          });
          return button;
        },
      ),
    );
    shade();
  }

  // Shade the context, press the buttons, and draw the map of every block.
  function shade() {
    const sample = view.shown[view.at];
    const known = Boolean(sample.weights?.length);
    for (const id of ["block", "head", "answer-tokens", "maps"])
      element(id).closest("label, div").hidden = !known;
    for (const legend of document.querySelectorAll("#attention .legend")) legend.hidden = !known;
    if (!known) return;
    [...element("answer-tokens").children].forEach((button, i) =>
      button.setAttribute("aria-pressed", String((i === 0 ? ALL : i - 1) === view.token)),
    );
    const values = weights(sample, view.block, view.token);
    const most = Math.max(...values);
    const spans = element("context").children;
    values.forEach((value, i) => {
      const strength = value / most;
      spans[i].style.backgroundColor = value ? `rgb(var(--heat) / ${strength.toFixed(3)})` : "";
      spans[i].style.color = strength > 0.5 ? "#1d2127" : "";
      spans[i].title = value ? percent(value) : "";
    });
    const peak = values.indexOf(most);
    element("peak").textContent = `most attended: “${visible(sample.tokens[peak])}”, ${percent(most)}`;
    element("context").scrollTop = spans[peak].offsetTop - element("context").offsetTop - 120;
    const focused = element("maps").contains(document.activeElement);
    element("maps").replaceChildren(...layers.flatMap((layer, block) => drawn(sample, layer, block)));
    if (focused) element("maps").querySelector('[aria-pressed="true"]').focus();
  }

  function drawn(sample, layer, block) {
    const button = create("button", name(layer, block), { type: "button" });
    button.setAttribute("aria-pressed", String(block === view.block));
    button.addEventListener("click", () => {
      view.block = block;
      element("block").value = block;
      shade();
    });
    const rows = sample.answer_tokens.length;
    const canvas = create("canvas", "", { width: sample.tokens.length, height: rows });
    canvas.style.height = `${Math.max(18, 9 * rows)}px`;
    const pen = canvas.getContext("2d");
    const colour = getComputedStyle(document.documentElement).getPropertyValue("--heat");
    for (let token = 0; token < rows; token++) {
      const values = weights(sample, block, token);
      values.forEach((value, i) => {
        pen.fillStyle = `rgb(${colour} / ${Math.sqrt(value / scale).toFixed(3)})`;
        if (value) pen.fillRect(i, token, 1, 1);
      });
    }
    return [button, canvas];
  }

  const name = (layer, block) => `block ${block + 1} (layer ${layer})`;
  const options = (texts, chosen) =>
    texts.map((text, i) => create("option", text, { value: i, selected: i === chosen }));
  element("block").replaceChildren(...options(layers.map(name), view.block));
  element("head").replaceChildren(
    ...options(
      [
        "mean of all",
        ...Array.from({ length: heads }, (_, i) => `${i + 1}${best && best[1] === i + 1 ? " ★" : ""}`),
      ],
      view.head,
    ),
  );
  element("block").addEventListener("change", (event) => {
    view.block = Number(event.target.value);
    shade();
  });
  element("head").addEventListener("change", (event) => {
    view.head = Number(event.target.value);
    shade();
  });
  element("search").addEventListener("input", filter);
  for (const button of document.querySelectorAll("[data-filter]")) {
    button.addEventListener("click", () => {
      view.filter = button.dataset.filter;
      for (const other of document.querySelectorAll("[data-filter]"))
        other.setAttribute("aria-pressed", String(other === button));
      filter();
    });
  }
  const go = (step) => {
    view.at = Math.min(Math.max(view.at + step, 0), view.shown.length - 1);
    show();
  };
  element("previous").addEventListener("click", () => go(-1));
  element("next").addEventListener("click", () => go(1));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => view.shown.length && shade());
  show();
})();
