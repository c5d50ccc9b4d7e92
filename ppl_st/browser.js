// The gene browser of a report (see browser.py): unpacks the maps of one gene, hands them to the figures, and keeps
// the search box, the address (#gene=NAME), the buttons and the reading of one cell in step.
(async () => {
  "use strict";
  const find = (id) => document.getElementById(id);
  const say = (text) => { find("gene-status").textContent = text; };
  if (typeof DecompressionStream === "undefined") {
    say("This browser is too old for the maps: it needs Chrome 80, Firefox 113 or Safari 16.4, or newer.");
    return;
  }

  const unpack = async (text) => {
    const packed = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate"));
    return new Response(stream).arrayBuffer();
  };
  const decode = async (map) => {
    const raw = await unpack(map.data);
    const codes = map.bits === 16 ? new Uint16Array(raw) : new Uint8Array(raw);
    const missing = 2 ** map.bits - 1;
    const value = (code) => {
      if (code === missing) return NaN;
      if (map.floor === undefined || code === 0) return code;
      return map.floor * map.ratio ** (code - 1);
    };
    return Float32Array.from(codes, value);
  };

  const data = JSON.parse(find("gene-data").textContent);
  const genes = new Map(data.genes.map((gene) => [gene.name, gene]));
  const order = [...genes.keys()];
  const channels = Object.keys(data.genes[0].maps);
  const grid = new Uint16Array(await unpack(data.xy.data));
  const n = grid.length / 2;
  const axis = (k) => Float64Array.from(grid.subarray(k * n, (k + 1) * n), (v) => data.xy.low[k] + data.xy.step * v);
  const names = new TextDecoder().decode(await unpack(data.names)).split("\n");
  const fixed = { x: axis(0), y: axis(1), name: names };

  const opened = performance.now();
  while (!window.Bokeh || !Bokeh.documents.length) {
    if (performance.now() - opened > 30000) throw new Error("the figures did not open");
    await new Promise((done) => setTimeout(done, 20));
  }
  const figures = Bokeh.documents[0];
  const model = (name) => figures.get_model_by_name(name);
  const cells = model("cells");
  if (matchMedia("(pointer: coarse)").matches) {  // a finger scrolls the page; two fingers zoom
    for (const channel of channels) {
      const bar = model(`map-${channel}`).toolbar;
      bar.active_drag = null;
      for (const tool of bar.tools) if (tool.type === "WheelZoomTool") tool.modifiers = {};
    }
    find("readout").textContent = `Pinch to zoom: all maps go together; the crossed arrows let a finger move them. Tap to read a ${data.noun}.`;
  }

  const words = { truth: "observed", mean: "predicted mean", sd: "sd of the mean", width: "interval width" };
  const help = find("readout").textContent;
  const read = () => {
    const [row] = cells.selected.indices;
    if (row === undefined) { find("readout").textContent = help; return; }
    const text = channels.map((channel) => {
      const value = cells.data[channel][row];
      return `${words[channel]} ${Number.isNaN(value) ? "none" : Number(value.toPrecision(3))}`;
    });
    find("readout").textContent = `${data.noun} ${names[row]}: ${text.join(", ")} (counts)`;
  };
  cells.selected.change.connect(read);

  let asked = 0;
  const show = async (gene) => {
    const mine = ++asked;
    const maps = await Promise.all(channels.map((channel) => decode(gene.maps[channel])));
    if (mine !== asked) return;  // another gene was asked for meanwhile
    for (const channel of channels) {
      const scale = model(`color-${channel}`);
      if (scale) scale.high = gene.high[channel];
    }
    cells.data = { ...fixed, ...Object.fromEntries(channels.map((channel, k) => [channel, maps[k]])) };
    find("gene").value = gene.name;
    const rows = gene.facts.map(([name, text]) => {
      const row = document.createElement("div"), term = document.createElement("dt"), meaning = document.createElement("dd");
      term.textContent = name;
      meaning.textContent = text;
      row.append(term, meaning);
      return row;
    });
    find("gene-facts").replaceChildren(...rows);
    const cut = channels.filter((channel) => gene.cut[channel]).map((channel) => `${gene.cut[channel]} of ${words[channel]}`);
    say(`${gene.name}, ${n.toLocaleString("en")} ${data.noun}s.` +
      (cut.length ? ` Drawn in the top colour although above the scale: ${cut.join(", ")}.` : ""));
    read();
    find("gene-browser").dataset.shown = gene.name;
  };

  const match = (text) => {
    if (genes.has(text.trim())) return text.trim();  // names may differ in capitals alone
    const wanted = text.trim().toLowerCase();
    if (!wanted) return undefined;
    const lower = order.map((name) => name.toLowerCase());
    const place = [(name) => name === wanted, (name) => name.startsWith(wanted), (name) => name.includes(wanted)]
      .map((test) => lower.findIndex(test)).find((index) => index >= 0);
    return place === undefined ? undefined : order[place];
  };
  const go = (name) => {
    const address = `#gene=${encodeURIComponent(name)}`;
    if (location.hash === address) show(genes.get(name));  // the address does not change: take away what was typed
    else location.hash = address;
  };
  const ask = (text) => {
    const name = match(text);
    if (name === undefined) say(`${text}: not among the ${order.length} genes of this page; make one with it by --genes.`);
    else go(name);
  };
  const fromAddress = () => {
    const name = decodeURIComponent(location.hash.replace(/^#gene=/, ""));
    return genes.get(name) ?? data.genes[0];
  };
  const beside = (step) => {
    const here = order.indexOf(find("gene-browser").dataset.shown);
    go(order[(here + step + order.length) % order.length]);
  };
  find("gene").addEventListener("change", (event) => ask(event.target.value));
  find("gene").addEventListener("input", (event) => { if (genes.has(event.target.value)) ask(event.target.value); });
  find("gene").addEventListener("keydown", (event) => { if (event.key === "Enter") ask(event.target.value); });
  find("gene").addEventListener("focus", (event) => event.target.select());
  find("previous").addEventListener("click", () => beside(-1));
  find("next").addEventListener("click", () => beside(1));
  addEventListener("hashchange", () => {
    if (!location.hash.startsWith("#gene=")) return;
    show(fromAddress());
  });
  await show(fromAddress());
})().catch((error) => {
  document.getElementById("gene-status").textContent = `The maps could not be opened: ${error.message}`;
  throw error;
});
