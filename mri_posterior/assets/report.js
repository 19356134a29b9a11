"use strict";
// The viewer: one slice, one cursor and one zoom for all images. Numbers are those of the page's data, in display units.
(async function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const [nSlices, height, width] = data.shape;
  const element = (id) => document.getElementById(id);
  const MISSING = 65535; // the code of a value that is not finite
  const MOST_ZOOM = 24;
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  const state = {
    slice: data.middle, sample: 0, row: height >> 1, column: width >> 1,
    zoom: 1, x: width / 2, y: height / 2, low: 0, high: data.windows.grey, range: 1, timer: null,
  };
  let fields = null; // of the shown slice: name -> Float32Array

  // Data: base64 -> deflate -> two planes of bytes (low, high) -> codes -> offset + step * code. The first byte says
  // what was stored: 0 codes, 1 differences along each row, 2 differences from the codes of the mean.

  function bytesOf(text) {
    return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  }

  async function inflate(array, slice) {
    const packed = new Blob([bytesOf(array.data[slice])]);
    return new Uint8Array(await new Response(packed.stream().pipeThrough(new DecompressionStream("deflate"))).arrayBuffer());
  }

  function codesOf(raw, mean) {
    const n = height * width, codes = new Uint16Array(n); // its arithmetic is modulo 2^16, as the differences are
    for (let i = 0; i < n; i++) {
      const stored = raw[1 + i] | (raw[1 + n + i] << 8), difference = (stored >>> 1) ^ -(stored & 1);
      if (raw[0] === 0) codes[i] = stored;
      else if (raw[0] === 1) codes[i] = (i % width ? codes[i - 1] : 0) + difference;
      else codes[i] = mean[i] + difference;
    }
    return codes;
  }

  const valuesOf = (array, codes) =>
    Float32Array.from(codes, (code) => (code === MISSING ? NaN : array.offset + array.step * code));

  const combine = (operation, a, b, c = b) => a.map((value, i) => operation(value, b[i], c[i]));

  async function loadSlice(slice) {
    const names = Object.keys(data.arrays);
    const raw = await Promise.all(names.map((name) => inflate(data.arrays[name], slice)));
    const mean = codesOf(raw[names.indexOf("mean")]);
    const found = Object.fromEntries(names.map((name, i) => [name, valuesOf(data.arrays[name], codesOf(raw[i], mean))]));
    found.width = combine((lower, upper) => upper - lower, found.lower, found.upper);
    if (found.reference) {
      found.error = combine((image, truth) => image - truth, found.mean, found.reference);
      found.baseline_error = combine((image, truth) => image - truth, found.baseline, found.reference);
      found.outside = combine(
        (truth, lower, upper) => Math.max(truth - upper, 0) - Math.max(lower - truth, 0),
        found.reference, found.lower, found.upper);
    }
    return found;
  }

  async function showSlice(slice) {
    state.slice = slice;
    const loaded = await loadSlice(slice);
    if (state.slice !== slice) return; // another one was asked for in the meantime
    fields = loaded;
    draw();
  }

  // Tiles

  // Each is 257 colours as the canvas wants them: red, green, blue, opaque; the last one is for missing values.
  const palettes = Object.fromEntries(Object.entries(data.palettes).map(([name, text]) => [name, bytesOf(text)]));
  const tiles = data.tiles.map(makeTile);

  function make(tag, properties, ...children) {
    const made = Object.assign(document.createElement(tag), properties);
    made.append(...children);
    return made;
  }

  function makeTile(choices) {
    const tile = { choice: choices[0], picture: make("canvas", { width, height }) };
    const title = choices.length === 1
      ? make("span", { className: "name", textContent: choices[0].label })
      : make("select", { ariaLabel: "What the last image shows" },
        ...choices.map((choice, i) => make("option", { value: i, textContent: choice.label })));
    tile.value = make("output", {});
    const enlarge = make("button", { type: "button", textContent: "⤢", title: "Enlarge or shrink" });
    enlarge.setAttribute("aria-label", `Enlarge or shrink: ${choices[0].label}`);
    tile.canvas = make("canvas", { ariaHidden: "true" });
    tile.gradient = make("i", {});
    tile.ends = [0, 1, 2].map(() => make("span", {}));
    tile.name = title;
    tile.figure = make("figure", { className: "tile" },
      make("figcaption", {}, title, tile.value, enlarge),
      tile.canvas,
      make("div", { className: "bar" }, tile.gradient, ...tile.ends));
    element("tiles").append(tile.figure);
    title.addEventListener("change", () => { tile.choice = choices[title.value]; draw(); });
    enlarge.addEventListener("click", () => { tile.figure.classList.toggle("large"); draw(); });
    listen(tile.canvas);
    return tile;
  }

  const nameOf = (choice) => (choice.name === "sample" ? data.samples[state.sample] : choice.name);

  function windowOf(choice) {
    if (choice.palette === "grey") return [state.low, state.high];
    const [low, high] = data.windows[choice.name];
    return choice.palette === "signed" ? [low * state.range, high * state.range] : [low, low + (high - low) * state.range];
  }

  // As many digits as the stored step has a say in.
  function text(value, name) {
    const step = (data.arrays[name] || data.arrays.mean).step;
    if (Number.isNaN(value)) return "–";
    const clipped = data.arrays[name]?.top !== undefined && value >= data.arrays[name].top ? "≥ " : "";
    return clipped + value.toFixed(Math.min(Math.max(Math.ceil(-Math.log10(step)), 0), 6)).replace("-", "−");
  }

  const short = (value) => String(Number(value.toPrecision(3))).replace("-", "−");

  // The part of the image that is in view, in pixels: left, top, width, height.
  function view() {
    const [w, h] = [width / state.zoom, height / state.zoom];
    state.x = Math.min(Math.max(state.x, w / 2), width - w / 2);
    state.y = Math.min(Math.max(state.y, h / 2), height - h / 2);
    return [state.x - w / 2, state.y - h / 2, w, h];
  }

  let pending = false;
  function draw() {
    if (pending) return;
    pending = true;
    requestAnimationFrame(() => {
      pending = false;
      if (!fields) return;
      tiles.forEach(drawTile);
      writeNumbers();
    });
  }

  function drawTile(tile) {
    const values = fields[nameOf(tile.choice)], palette = palettes[tile.choice.palette];
    const [low, high] = windowOf(tile.choice), scale = 255 / (high - low);
    const context = tile.picture.getContext("2d"), image = context.createImageData(width, height);
    const pixels = new Uint32Array(image.data.buffer), colours = new Uint32Array(palette.buffer);
    for (let i = 0; i < values.length; i++) {
      const colour = Math.round(Math.min(Math.max((values[i] - low) * scale, 0), 255));
      pixels[i] = colours[Number.isNaN(colour) ? 256 : colour];
    }
    context.putImageData(image, 0, 0);

    const canvas = tile.canvas, pixel = window.devicePixelRatio || 1;
    const [columns, rows] = [Math.round(canvas.clientWidth * pixel), Math.round(canvas.clientHeight * pixel)];
    if (canvas.width !== columns || canvas.height !== rows) Object.assign(canvas, { width: columns, height: rows });
    const shown = canvas.getContext("2d"), [left, top, w, h] = view();
    shown.imageSmoothingEnabled = false;
    shown.drawImage(tile.picture, left, top, w, h, 0, 0, columns, rows);
    drawCursor(shown, ((state.column + 0.5 - left) * columns) / w, ((state.row + 0.5 - top) * rows) / h, pixel);

    const stops = [];
    for (let i = 0; i < 256; i += 15) stops.push(`rgb(${palette.subarray(4 * i, 4 * i + 3).join(" ")})`);
    tile.gradient.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
    [low, (low + high) / 2, high].forEach((value, i) => { tile.ends[i].textContent = short(value); });
    tile.value.textContent = text(values[state.row * width + state.column], nameOf(tile.choice));
  }

  function drawCursor(context, x, y, pixel) {
    const [gap, length] = [4 * pixel, 12 * pixel];
    for (const [colour, thick] of [["#000", 3], ["#ffd24a", 1.25]]) { // dark rim: seen on bright and dark tissue
      context.strokeStyle = colour;
      context.lineWidth = thick * pixel;
      context.beginPath();
      for (const [dx, dy] of [[1, 0], [-1, 0], [0, 1], [0, -1]]) {
        context.moveTo(x + dx * gap, y + dy * gap);
        context.lineTo(x + dx * length, y + dy * length);
      }
      context.stroke();
    }
  }

  function writeNumbers() {
    const at = state.row * width + state.column;
    for (const name of ["mean", "lower", "upper", "std"]) element(name).textContent = text(fields[name][at], name);
    element("where").textContent = `slice ${data.slices[state.slice]}, row ${state.row}, column ${state.column}`;
    element("slice").value = state.slice;
    element("slice-value").textContent = `${data.slices[state.slice]} (${state.slice + 1} of ${nSlices})`;
    element("sample").value = state.sample;
    element("sample-value").textContent = `${state.sample + 1} of ${data.samples.length}`;
    element("range-value").textContent = `${short(state.range)}×`;
    element("zoom-value").textContent = `${state.zoom.toFixed(1)}×`;
    element("tiles").classList.toggle("zoomed", state.zoom > 1);
  }

  // For those who do not see the images: after a key press, not while the pointer moves.
  function speak() {
    const at = state.row * width + state.column, say = (name) => text(fields[name][at], name);
    element("spoken").textContent = `${element("where").textContent}: mean ${say("mean")}, ` +
      `interval ${say("lower")} to ${say("upper")}, standard deviation ${say("std")}`;
  }

  // Cursor, zoom and pan

  function moveCursor(row, column) {
    state.row = Math.min(Math.max(Math.floor(row), 0), height - 1);
    state.column = Math.min(Math.max(Math.floor(column), 0), width - 1);
    draw();
  }

  function keepCursorInView() {
    const [left, top, w, h] = view();
    state.x += Math.min(state.column - left, 0) + Math.max(state.column + 1 - left - w, 0);
    state.y += Math.min(state.row - top, 0) + Math.max(state.row + 1 - top - h, 0);
  }

  // Zoom about a point of the image that stays where it is on the screen.
  function zoomBy(factor, x = state.column + 0.5, y = state.row + 0.5) {
    const zoom = Math.min(Math.max(state.zoom * factor, 1), MOST_ZOOM), kept = state.zoom / zoom;
    [state.x, state.y, state.zoom] = [x + (state.x - x) * kept, y + (state.y - y) * kept, zoom];
    draw();
  }

  function reset() {
    Object.assign(state, { zoom: 1, x: width / 2, y: height / 2, low: 0, high: data.windows.grey, range: 1 });
    writeWindow();
    element("range").value = 0;
    draw();
  }

  function listen(canvas) {
    const fingers = new Map();
    const pixelAt = (event) => {
      const [left, top, w, h] = view(), box = canvas.getBoundingClientRect();
      return [left + ((event.clientX - box.left) * w) / box.width, top + ((event.clientY - box.top) * h) / box.height];
    };
    const spread = () => {
      const [a, b] = [...fingers.values()];
      return Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY);
    };
    canvas.addEventListener("pointerdown", (event) => {
      fingers.set(event.pointerId, event);
      canvas.setPointerCapture(event.pointerId);
      const [x, y] = pixelAt(event);
      moveCursor(y, x);
    });
    canvas.addEventListener("pointermove", (event) => {
      const before = fingers.get(event.pointerId), [x, y] = pixelAt(event);
      if (!before) return moveCursor(y, x);
      if (fingers.size === 2) {
        const apart = spread();
        fingers.set(event.pointerId, event);
        return zoomBy(spread() / Math.max(apart, 1), x, y);
      }
      const [fromX, fromY] = pixelAt(before);
      fingers.set(event.pointerId, event);
      [state.x, state.y] = [state.x + fromX - x, state.y + fromY - y];
      draw();
    });
    for (const end of ["pointerup", "pointercancel"]) canvas.addEventListener(end, (e) => fingers.delete(e.pointerId));
    canvas.addEventListener("dblclick", (event) => zoomBy(event.shiftKey ? 0.5 : 2, ...pixelAt(event)));
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && !event.metaKey) return; // a bare wheel scrolls the page
      event.preventDefault();
      zoomBy(Math.exp(-event.deltaY / 200), ...pixelAt(event));
    }, { passive: false });
  }

  // Controls

  const grey = data.windows.most / 1000; // one notch of the level and window sliders

  function writeWindow() {
    element("level").value = (state.low + state.high) / 2 / grey;
    element("window").value = (state.high - state.low) / grey;
  }

  function readWindow() {
    const [level, half] = [element("level").value * grey, (element("window").value * grey) / 2];
    [state.low, state.high] = [level - half, level + half];
    draw();
  }

  const setSlice = (slice) => showSlice(Math.min(Math.max(slice, 0), nSlices - 1)).catch(fail);

  function setSample(sample) {
    state.sample = (sample + data.samples.length) % data.samples.length;
    draw();
  }

  function play() {
    const button = element("play"), playing = state.timer !== null;
    clearInterval(state.timer);
    // Slower than three flashes a second; slower still where the reader asks for less motion.
    state.timer = playing ? null : setInterval(() => setSample(state.sample + 1), calm.matches ? 1500 : 400);
    button.setAttribute("aria-pressed", String(!playing));
    button.textContent = playing ? "Flicker" : "Stop";
  }

  function onKey(event) {
    if (event.target !== event.currentTarget || event.ctrlKey || event.metaKey || event.altKey) return;
    const far = event.shiftKey ? 10 : 1, { row, column } = state;
    const actions = {
      ArrowUp: () => moveCursor(row - far, column), ArrowDown: () => moveCursor(row + far, column),
      ArrowLeft: () => moveCursor(row, column - far), ArrowRight: () => moveCursor(row, column + far),
      PageUp: () => setSlice(state.slice - 1), PageDown: () => setSlice(state.slice + 1),
      "[": () => setSample(state.sample - 1), "]": () => setSample(state.sample + 1), " ": play,
      "+": () => zoomBy(1.25), "=": () => zoomBy(1.25), "-": () => zoomBy(0.8), "0": reset,
    };
    if (!actions[event.key] || (!data.samples.length && "[ ]".includes(event.key))) return;
    event.preventDefault();
    actions[event.key]();
    keepCursorInView();
    requestAnimationFrame(speak);
  }

  function fail(error) {
    const reason = `The images cannot be shown (${error.message}).`;
    element("failure").textContent = `${reason} This page needs a browser of 2023 or later.`;
    element("failure").hidden = false;
  }

  element("slice").max = nSlices - 1;
  element("sample").max = Math.max(data.samples.length - 1, 0);
  element("sampling").hidden = !data.samples.length;
  element("slice").addEventListener("input", (event) => setSlice(Number(event.target.value)));
  element("sample").addEventListener("input", (event) => setSample(Number(event.target.value)));
  for (const id of ["level", "window"]) element(id).addEventListener("input", readWindow);
  element("range").addEventListener("input", (event) => { state.range = 10 ** (event.target.value / 20); draw(); });
  element("zoom-in").addEventListener("click", () => zoomBy(1.5));
  element("zoom-out").addEventListener("click", () => zoomBy(1 / 1.5));
  element("reset").addEventListener("click", reset);
  element("play").addEventListener("click", play);
  element("tiles").addEventListener("keydown", onKey);
  document.documentElement.style.setProperty("--aspect", width / height);
  new ResizeObserver(draw).observe(element("tiles"));
  reset();
  await setSlice(state.slice);
})();
