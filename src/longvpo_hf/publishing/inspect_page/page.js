"use strict";
// Everything that comes from the dataset becomes text nodes or the values of harmless attributes, never HTML.
const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);
const number = (value, digits = 0) => value.toLocaleString("en", { maximumFractionDigits: digits });
const signed = (value, digits) => value.toFixed(digits).replace("-", "−");
const THIRDS = ["begin", "middle", "end"];
const THINGS = data.kind; // rows of a dataset, or captioned videos

function put(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null && child !== ""));
  return node;
}
const el = (name, attributes = {}, ...children) => put(document.createElement(name), attributes, children);
const svg = (name, attributes = {}, ...children) =>
  put(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
const said = (name, text, attributes = {}) => el(name, { dir: "auto", ...attributes, class: `said ${attributes.class ?? ""}`.trim() }, text);

function clock(seconds) { // 0:04, 1:05.5, 2:03:04
  const tenths = Math.round(seconds * 10), whole = Math.floor(tenths / 10), two = (value) => String(value).padStart(2, "0");
  const minutes = Math.floor(whole / 60), rest = two(whole % 60) + (tenths % 10 ? `.${tenths % 10}` : "");
  return minutes < 60 ? `${minutes}:${rest}` : `${Math.floor(minutes / 60)}:${two(minutes % 60)}:${rest}`;
}

const between = (start, end) => (start === null ? "" : `${clock(start)}–${clock(end)}`);

// --------------------------------------------------------------------------------------------------------- plots

// Round numbers from 0 up to `most`, at most five.
function ticks(most) {
  const power = 10 ** Math.floor(Math.log10(Math.max(1, most / 4)));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((value) => most / value <= 4);
  return Array.from({ length: Math.floor(most / step) + 1 }, (_, i) => i * step);
}

function columns(plot) {
  const width = 340, height = 150, left = 34, right = 8, top = 12, bottom = 32;
  const { counts } = plot, most = Math.max(...counts, plot.expected ?? 0);
  const step = (width - left - right) / counts.length, y = (value) => height - bottom - (value / most) * (height - top - bottom);
  const names = plot.labels ?? counts.map((_, i) => `${plot.edges[i]}–${plot.edges[i + 1]}`);
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label":
    `${plot.title}, number of ${plot.of} by ${plot.axis}: ${names.map((name, i) => `${name}: ${number(counts[i])}`).join("; ")}` });
  for (const value of ticks(most)) {
    drawing.append(svg("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
      svg("text", { x: left - 5, y: y(value) + 3.5, "text-anchor": "end" }, number(value)));
  }
  counts.forEach((count, i) => {
    const inset = Math.min(step * 0.12, 3), wide = Math.min(step - 2 * inset, 46);
    drawing.append(svg("rect", { class: "bar", rx: 1.5, x: left + (i + 0.5) * step - wide / 2, width: wide, y: y(count), height: y(0) - y(count) },
      svg("title", {}, `${names[i]} ${plot.axis}: ${number(count)} ${plot.of}`)));
  });
  const marks = plot.labels ?? plot.edges, every = Math.ceil(marks.length / 11), shift = plot.labels ? 0.5 : 0;
  marks.forEach((mark, i) => {
    if (i % every === 0) drawing.append(svg("text", { x: left + (i + shift) * step, y: height - bottom + 13, "text-anchor": "middle" }, mark));
  });
  drawing.append(svg("text", { x: left + (width - left - right) / 2, y: height - 4, "text-anchor": "middle" }, plot.axis));
  if (plot.expected) {
    drawing.append(svg("line", { class: "even", x1: left, x2: width - right, y1: y(plot.expected), y2: y(plot.expected) }));
  }
  return el("figure", { class: "card" }, el("figcaption", {}, plot.title, el("small", {}, `number of ${plot.of}`,
    plot.expected ? el("span", { class: "even-name" }, " ┄ if spread evenly") : null)), drawing);
}

function bars(title, about, entries, kind) {
  const width = 340, line = 31, most = Math.max(1, ...entries.map(([, count]) => count));
  const drawing = svg("svg", { viewBox: `0 0 ${width} ${entries.length * line}`, role: "img",
    "aria-label": `${title}: ${entries.map(([name, count]) => `${name}: ${number(count)}`).join("; ")}` });
  entries.forEach(([name, count], i) => {
    const short = name.length > 44 ? `${name.slice(0, 43)}…` : name;
    drawing.append(svg("text", { class: "name", x: 0, y: i * line + 13 }, short),
      svg("text", { x: width, y: i * line + 13, "text-anchor": "end" }, number(count)),
      svg("rect", { class: kind, rx: 1.5, x: 0, y: i * line + 18, height: 7, width: Math.max(1.5, (count / most) * width) },
        svg("title", {}, `${name}: ${number(count)}`)));
  });
  return el("figure", { class: "card" }, el("figcaption", {}, title, el("small", {}, about)), drawing);
}

// Numbers of different things, which no common scale compares: sources, drafts about them, rows.
function counted(title, about, entries) {
  return el("figure", { class: "card counted" }, el("figcaption", {}, title, el("small", {}, about)),
    el("dl", {}, ...entries.flatMap(([name, count]) => [said("dt", name), el("dd", {}, number(count))])));
}

// ---------------------------------------------------------------------------------------------------------- rows

function words(row) {
  if (row.error !== undefined) return [row.id, row.error];
  const ofClips = row.clips.flatMap((clip) => [clip.file, clip.source, clip.licence, clip.caption, clip.problem]);
  return [row.id, row.question, row.chosen, row.rejected, ...row.verdicts, ...Object.values(row.facts), ...ofClips];
}

function rail(row) {
  const drawing = svg("svg", { class: "rail", viewBox: "0 0 1000 14", preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("rect", { class: "track", x: 0, y: 2, width: 1000, height: 5, rx: 2 }));
  for (const [begin, end] of row.evidence_spans) {
    drawing.append(svg("rect", { class: "evidence", x: 1000 * begin, y: 0, width: Math.max(3, 1000 * (end - begin)), height: 9 }));
  }
  for (const [begin, end] of row.reference_spans) {
    drawing.append(svg("rect", { class: "reference", x: 1000 * begin, y: 11, width: Math.max(3, 1000 * (end - begin)), height: 3 }));
  }
  return drawing;
}

function filmstrip(row, word) {
  const strip = el("ol", { class: "strip", "aria-label": `Filmstrip of ${row.num_clips} clips` });
  const gap = (from, to) => {
    if (to > from) strip.append(el("li", { class: "gap" }, to - from === 1 ? `clip ${from} not shown` : `clips ${from}–${to - 1} not shown`));
  };
  let next = 0;
  for (const clip of row.clips) {
    gap(next, clip.index);
    next = clip.index + 1;
    const evidence = row.evidence.includes(clip.index), reference = row.reference.includes(clip.index);
    const marks = [evidence && word, reference && "reference"].filter(Boolean);
    const span = between(clip.start, clip.end);
    const name = `Clip ${clip.index}, ${span} of the timeline${marks.length ? `, ${marks.join(" and ")}` : ""}`;
    const picture = clip.picture === null
      ? el("span", { class: "blank" }, `⚠ ${clip.problem.split(":")[0]}`)
      : el("img", { src: `data:image/jpeg;base64,${data.pictures[clip.picture]}`, alt: name, loading: "lazy", decoding: "async" });
    const under = el("div", { class: "under" }, el("b", {}, String(clip.index)), ` · ${span}`);
    if (marks.length) {
      under.append(el("span", { class: "badges", "aria-hidden": clip.picture === null ? null : "true" },
        evidence ? el("span", { class: "badge evidence" }, `★ ${word}`) : null,
        reference ? el("span", { class: "badge" }, "◆ reference") : null));
    }
    if (clip.similarity !== null && !(evidence && clip.similarity > 0.9999)) {
      under.append(el("div", {}, `cosine ${signed(clip.similarity, 2)}`),
        svg("svg", { class: "like", viewBox: "0 0 100 4", preserveAspectRatio: "none", "aria-hidden": "true" },
          svg("rect", { class: "track", width: 100, height: 4 }),
          svg("rect", { class: "bar", width: 100 * Math.max(0, Math.min(1, clip.similarity)), height: 4 })));
    }
    strip.append(el("li", { class: `clip${evidence ? " is-evidence" : ""}${reference ? " is-reference" : ""}` }, picture, under));
  }
  gap(next, row.num_clips);
  return strip;
}

function provenance(row) {
  const facts = el("dl", { class: "facts" });
  for (const [name, value] of Object.entries(row.facts)) facts.append(el("dt", {}, name), said("dd", value));
  if (row.verdicts.length) facts.append(el("dt", {}, "verdicts"), said("dd", row.verdicts.join(", ")));
  const used = (name) => row.clips.some((clip) => clip[name] !== "" && clip[name] !== null);
  const table = [
    ["clip", (clip) => String(clip.index), "number"],
    ["on the timeline", (clip) => between(clip.start, clip.end), "number"],
    ["in its file", (clip) => between(clip.file_start, clip.file_end), "number"],
    used("similarity") && ["cosine", (clip) => (clip.similarity === null ? "–" : signed(clip.similarity, 3)), "number"],
    used("caption") && ["caption", (clip) => clip.caption, "long"],
    ["file", (clip) => clip.file, "long"],
    used("source") && ["source", (clip) => clip.source, "long"],
    used("source_start") && ["in its source", (clip) => between(clip.source_start, clip.source_end), "number"],
    used("licence") && ["licence", (clip) => clip.licence, ""],
  ].filter(Boolean);
  const cells = row.clips.map((clip) => el("tr", {}, ...table.map(([, text, kind]) => said("td", text(clip), { class: kind }))));
  return [facts, el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Clips of row ${row.number}` },
    el("table", {}, el("thead", {}, el("tr", {}, ...table.map(([name]) => el("th", { scope: "col" }, name)))), el("tbody", {}, ...cells)))];
}

const listed = (indices) => (indices.length > 8 ? `${indices.length} clips` : `${indices.length > 1 ? "clips" : "clip"} ${indices.join(", ")}`);

function article(row) {
  const link = el("a", { href: `#${new URLSearchParams({ q: row.id })}`, title: "Link to this row" }, el("code", {}, row.id));
  const top = el("div", { class: "top" }, el("h3", {}, `Row ${number(row.number)}`), link);
  const card = el("article", { class: "card row", "aria-label": `Row ${number(row.number)}` }, top);
  if (row.error !== undefined) {
    card.append(el("p", { class: "problems" }, "⚠ This row is no preference: ", said("span", row.error)));
    return card;
  }
  // One clip that holds the answer and that the reference model is scored on: what LongVPO calls the anchor.
  const word = row.evidence.length === 1 && row.reference.length === 1 && row.evidence[0] === row.reference[0] ? "anchor" : "evidence";
  const where = row.thirds.map((third) => ["first", "middle", "last"][third]).join(" and ");
  top.append(
    row.facts.method ? el("span", { class: "chip" }, row.facts.method) : "",
    el("span", {}, `${number(row.num_clips)} ${row.num_clips === 1 ? "clip" : "clips"} · ${clock(row.seconds)}`),
    el("span", {}, row.evidence.length ? `★ ${word}: ${listed(row.evidence)}, ${where} third` : "★ no evidence named"),
    el("span", {}, `◆ reference: ${row.reference.length ? listed(row.reference) : "the whole timeline"}`));
  card.append(said("p", row.question, { class: "question" }), rail(row), filmstrip(row, word));
  const told = row.clips.filter((clip) => row.evidence.includes(clip.index) && clip.caption);
  for (const clip of told.slice(0, 3)) {
    card.append(el("p", { class: "told" }, el("b", {}, `★ clip ${clip.index}, caption: `), said("span", clip.caption)));
  }
  const problems = row.clips.filter((clip) => clip.problem);
  if (problems.length) {
    card.append(el("ul", { class: "problems", "aria-label": "Pictures that are missing" }, ...problems.map((clip) => said("li", `Clip ${clip.index} (${clip.file}) has no picture. ${clip.problem}`))));
  }
  const answer = (kind, title, view, text) => {
    const body = said("p", text), whole = el("button", { "aria-expanded": "false" }, `Show all of ${number(text.length)} characters`);
    if (text.length > 900) body.classList.add("cut");
    whole.addEventListener("click", () => {
      const cut = body.classList.toggle("cut");
      whole.textContent = cut ? `Show all of ${number(text.length)} characters` : "Show less";
      whole.setAttribute("aria-expanded", String(!cut));
    });
    return el("section", { class: `answer ${kind}`, "aria-label": `${title.slice(2)} answer` },
      el("h4", {}, title, view ? el("small", {}, ` · seen from ${view}`) : ""), body, text.length > 900 ? whole : null);
  };
  card.append(el("div", { class: "answers" },
    answer("chosen", "✓ Chosen", row.facts["chosen answer seen from"], row.chosen),
    answer("rejected", "✗ Rejected", row.facts["rejected answer seen from"], row.rejected)));
  const details = el("details", {}, el("summary", {}, "Provenance, verdicts and clips"));
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(...provenance(row));
  });
  card.append(details);
  return card;
}

// -------------------------------------------------------------------------------------------------------- videos

function wordsOfVideo(video) {
  const ofScenes = video.scenes.flatMap((scene) => [scene.file, scene.source, scene.licence, scene.caption, scene.problem]);
  return [video.id, ...ofScenes, ...video.summaries.map((summary) => summary.text)];
}

const MEDIAN_SCENE_PIXELS = 150, MOST_PIXELS = 400_000;

function place(node, begin, end) { // parts of the timeline, from 0 to 1; set in the style sheet's object model, which the policy allows
  node.style.left = `${100 * begin}%`;
  node.style.width = `${100 * (end - begin)}%`;
  return node;
}

function film(video, read) {
  const lengths = video.scenes.map((scene) => scene.end - scene.start).sort((a, b) => a - b);
  const pixels = Math.min(MOST_PIXELS, (MEDIAN_SCENE_PIXELS / lengths[lengths.length >> 1]) * video.seconds);
  const inner = el("div");
  inner.style.width = `${Math.round(pixels)}px`;
  const unread = [...read.children];
  const press = (button, ...what) => { // pressed again, it gives the whole video back
    const again = button.getAttribute("aria-pressed") === "true";
    for (const other of inner.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button && !again));
    read.replaceChildren(...(again ? unread : what));
  };
  const part = (name, title, text, ...children) => {
    const button = el("button", { "aria-pressed": "false", "aria-label": `${name}: ${text || "no caption"}`, title: text }, ...children);
    button.addEventListener("click", () => press(button, el("h4", {}, title), said("p", text || "This scene has no caption.")));
    return button;
  };
  const levels = [...new Set(video.summaries.map((summary) => summary.level))].sort((a, b) => b - a);
  for (const level of levels) {
    const lane = el("div", { class: "lane", role: "group", "aria-label": `Summaries of level ${level}` });
    for (const summary of video.summaries.filter((one) => one.level === level)) {
      const name = `Scenes ${summary.first}–${summary.last}`;
      lane.append(place(part(`Summary of ${name.toLowerCase()}`, `${name} · summary of level ${level}`, summary.text,
        el("span", {}, el("b", {}, `${summary.first}–${summary.last}`), ` ${summary.text}`)), ...summary.span));
    }
    inner.append(lane);
  }
  const scenes = el("ol", { class: "scenes", "aria-label": `${number(video.scenes.length)} of ${number(video.num_clips)} scenes` });
  for (const scene of video.scenes) {
    const span = between(scene.start, scene.end);
    const picture = scene.picture === null
      ? el("span", { class: "blank" }, scene.problem ? `⚠ ${scene.problem.split(":")[0]}` : "")
      : el("img", { src: `data:image/jpeg;base64,${data.pictures[scene.picture]}`, alt: "", loading: "lazy", decoding: "async" });
    const path = scene.path.length ? ` · summed up in ${scene.path.join(" › ")}` : "";
    const button = part(`Scene ${scene.index}, ${span}`, `Scene ${scene.index} · ${span}${path}`, scene.caption, picture,
      el("span", { class: "under" }, el("b", {}, String(scene.index)), ` · ${span}`, said("span", scene.caption || "no caption")));
    scenes.append(place(el("li", { class: scene.caption ? null : "is-uncaptioned" }, button), ...scene.span));
  }
  inner.append(scenes);
  return el("div", { class: "film", tabindex: "0", role: "region", "aria-label": `Timeline of video ${video.number}` }, inner);
}

function scenesTable(video) {
  const columns = [
    ["scene", (scene) => String(scene.index), "number"],
    ["on the timeline", (scene) => between(scene.start, scene.end), "number"],
    ["in its file", (scene) => between(scene.file_start, scene.file_end), "number"],
    ["caption", (scene) => scene.caption, "long"],
    ["summed up in", (scene) => scene.path.join(" › "), ""],
    ["file", (scene) => scene.file, "long"],
    ["source", (scene) => scene.source, "long"],
    ["in its source", (scene) => between(scene.source_start, scene.source_end), "number"],
    ["licence", (scene) => scene.licence, ""],
  ].filter(([, text]) => video.scenes.some((scene) => text(scene) !== ""));
  const cells = video.scenes.map((scene) => el("tr", {}, ...columns.map(([, text, kind]) => said("td", text(scene), { class: kind }))));
  return el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Scenes of video ${video.number}` },
    el("table", {}, el("thead", {}, el("tr", {}, ...columns.map(([name]) => el("th", { scope: "col" }, name)))), el("tbody", {}, ...cells)));
}

function videoCard(video) {
  const read = el("div", { class: "read", "aria-live": "polite" }, el("h4", {}, "The whole video"), ...video.history.map((line) => said("p", line)));
  const link = el("a", { href: `#${new URLSearchParams({ q: video.id })}`, title: "Link to this video" }, said("code", video.id));
  const hidden = video.num_clips - video.scenes.length;
  const top = el("div", { class: "top" }, el("h3", {}, `Video ${number(video.number)}`), link,
    el("span", {}, `${number(video.num_clips)} ${video.num_clips === 1 ? "scene" : "scenes"} · ${clock(video.seconds)}`),
    video.num_captions < video.num_clips ? el("span", {}, `⚠ ${number(video.num_clips - video.num_captions)} without a caption`) : "",
    hidden ? el("span", {}, `${number(hidden)} not shown, spread evenly`) : "");
  const details = el("details", {}, el("summary", {}, "Scenes as a table"));
  details.addEventListener("toggle", () => {
    if (details.open && details.children.length === 1) details.append(scenesTable(video));
  });
  const problems = video.scenes.filter((scene) => scene.problem);
  return el("article", { class: "card row", "aria-label": `Video ${number(video.number)}` }, top, film(video, read), read,
    problems.length ? el("ul", { class: "problems", "aria-label": "Pictures that are missing" }, ...problems.slice(0, 5).map((scene) => said("li", `Scene ${scene.index} (${scene.file}) has no picture. ${scene.problem}`)),
      problems.length > 5 ? el("li", {}, `and ${number(problems.length - 5)} more`) : null) : null, details);
}

// ------------------------------------------------------------------------------------------------------- filters

const form = byId("filters"), FIELDS = ["q", "method", "third", "min", "max"];
const [draw, wordsOf] = THINGS === "videos" ? [videoCard, wordsOfVideo] : [article, words];
const entries = data.rows.map((row) => ({ row, card: draw(row), text: wordsOf(row).join("\n").toLowerCase() }));

function matches({ row, text }, state) {
  if (!state.q.toLowerCase().split(/\s+/).every((word) => text.includes(word))) return false;
  if (state.method && (row.facts ?? {}).method !== state.method) return false;
  if (state.third && !(row.thirds ?? []).includes(THIRDS.indexOf(state.third))) return false;
  if (state.min && !(row.num_clips >= Number(state.min))) return false;
  return !(state.max && !(row.num_clips <= Number(state.max)));
}

function filter() {
  const state = Object.fromEntries(FIELDS.map((name) => [name, form.elements[name].value.trim()]));
  let shown = 0;
  for (const entry of entries) {
    const match = matches(entry, state);
    entry.card.hidden = !match;
    shown += match;
  }
  const filtered = FIELDS.some((name) => state[name]);
  byId("status").textContent = filtered
    ? `${number(shown)} of the ${number(entries.length)} ${THINGS} on this page match.${shown ? "" : " Clear the filters to see them all."}`
    : `Showing ${number(data.rows.length)} of ${number(data.total)} ${THINGS}.`;
  const reason = byId("reason").value;
  const parts = new URLSearchParams();
  for (const name of FIELDS) if (state[name]) parts.set(name, state[name]);
  if (reason) parts.set("reason", reason);
  let drops = 0, all = 0;
  for (const group of byId("drop-list").children) {
    const match = !reason || group.dataset.reason === reason;
    group.hidden = !match;
    if (match) { drops += Number(group.dataset.shown); all += Number(group.dataset.total); }
  }
  byId("drops-status").textContent = `Showing ${number(drops)} of ${number(all)} drops.`;
  return parts.toString();
}

function remember() {
  const parts = filter();
  history.replaceState(null, "", parts ? `#${parts}` : location.pathname + location.search);
}

function recall() {
  const parts = new URLSearchParams(location.hash.slice(1));
  for (const name of FIELDS) form.elements[name].value = parts.get(name) ?? "";
  byId("reason").value = parts.get("reason") ?? "";
  filter();
}

// ---------------------------------------------------------------------------------------------------------- start

for (const part of document.querySelectorAll("[data-kind]")) part.hidden = part.dataset.kind !== THINGS;
const methods = [...new Set(data.rows.map((row) => (row.facts ?? {}).method).filter(Boolean))].sort();
for (const method of methods) form.elements.method.append(el("option", { value: method }, method));
byId("lead").append(
  "Showing ", el("strong", {}, `${number(data.rows.length)} of ${number(data.total)}`), ` ${THINGS}`,
  data.rows.length < data.total ? `, drawn evenly over the whole (seed ${data.seed})` : "",
  methods.length ? ` · ${methods.join(", ")}` : "", ...data.facts.map((fact) => ` · ${fact}`));
if (data.invalid) data.notices.unshift(`${number(data.invalid)} of ${number(data.total)} rows are no preferences; those on this page say why.`);
for (const notice of data.notices) byId("notices").append(said("p", notice, { class: "notice" }));

const stages = Object.entries(data.stages);
for (const plot of data.plots) byId("plots").append(columns(plot));
if (stages.length) byId("plots").append(counted("What came through", "number at each stage of the build; stages count different things", stages));
const reasons = data.reasons.filter((reason) => reason.total);
if (reasons.length) {
  byId("plots").append(bars("What was dropped", "number for each reason", reasons.map((reason) => [reason.name, reason.total]), "lost"));
  byId("drops-section").hidden = byId("to-drops").hidden = false;
  for (const reason of reasons) {
    byId("reason").append(el("option", { value: reason.name }, `${reason.name} (${number(reason.total)})`));
    byId("drop-list").append(el("section", { "data-reason": reason.name, "data-shown": reason.drops.length, "data-total": reason.total },
      ...(reason.drops.length ? reason.drops : [{}]).map((drop) => {
        const facts = el("dl", { class: "facts" });
        for (const [name, value] of Object.entries(drop)) facts.append(said("dt", name), said("dd", value));
        return el("div", { class: "card drop" }, said("b", reason.name), reason.about ? el("span", { class: "soft" }, ` · ${reason.about}`) : null, facts);
      })));
  }
}
byId("list").append(...entries.map((entry) => entry.card));
form.addEventListener("input", remember);
form.addEventListener("submit", (event) => event.preventDefault());
form.addEventListener("reset", () => setTimeout(remember));
byId("reason").addEventListener("input", remember);
addEventListener("hashchange", recall);
for (const jump of document.querySelectorAll("[data-jump]")) {
  jump.addEventListener("click", (event) => {
    event.preventDefault(); // the address is the filters'
    byId(jump.hash.slice(1)).focus();
  });
}
recall();
