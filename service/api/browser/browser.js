// Shows the OpenAPI document that this service serves, and tries its calls on this service. Nothing else is loaded.
"use strict";

const VERBS = ["get", "post", "put", "patch", "delete"];
let spec;
let calls = []; // {id, verb, path, operation}

/** An element. Text is always text: nothing of the document or of an answer becomes markup. */
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat(Infinity).filter((child) => child != null && child !== false));
  return node;
}

/** `code` and **bold** in a line of text. */
function inline(text) {
  return text.split(/(`[^`]+`|\*\*[^*]+\*\*)/).map((part) => {
    if (/^`.+`$/.test(part)) return el("code", {}, part.slice(1, -1));
    if (/^\*\*.+\*\*$/.test(part)) return el("strong", {}, part.slice(2, -2));
    return part;
  });
}

const prose = (text) => (text || "").trim().split(/\n\s*\n/).filter(Boolean).map((each) => el("p", { class: "prose" }, inline(each)));
const pretty = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, 2));

function resolved(value) {
  if (!value || !value.$ref) return value;
  return value.$ref.slice(2).split("/").reduce((found, part) => found[part], spec);
}

const refName = (value) => (value && value.$ref ? value.$ref.split("/").pop() : null);

// -- schemas

function kindOf(schema) {
  if (schema == null || schema === true || Object.keys(schema).length === 0) return "anything";
  if (schema.$ref) return refName(schema);
  if ("const" in schema) return JSON.stringify(schema.const);
  if (schema.enum && !schema.type) return schema.enum.map((each) => JSON.stringify(each)).join(", ");
  const either = schema.anyOf || schema.oneOf;
  if (either) return either.map(kindOf).join(" or ");
  const kinds = [].concat(schema.type || "anything");
  return kinds.map((kind) => (kind === "array" ? `list of ${kindOf(schema.items)}` : kind)).join(" or ");
}

function bounds(schema) {
  const found = [];
  if (schema.enum) found.push("one of " + schema.enum.map((each) => JSON.stringify(each)).join(", "));
  if (schema.minimum != null || schema.maximum != null) found.push(`${schema.minimum ?? ""} … ${schema.maximum ?? ""}`);
  if (schema.maxLength != null) found.push(`at most ${schema.maxLength} characters`);
  if (schema.maxItems != null) found.push(`at most ${schema.maxItems}`);
  if (schema.maxProperties) found.push(`at most ${schema.maxProperties}`);
  if (schema.format) found.push(schema.format);
  if (schema.pattern) found.push(schema.pattern);
  if ("default" in schema) found.push(`default ${JSON.stringify(schema.default)}`);
  return found.join("; ");
}

/** What is inside of a schema, to be opened; null where it has no parts. */
function parts(schema) {
  if (!schema || typeof schema !== "object") return null;
  if (schema.$ref) {
    const name = refName(schema);
    const box = el("details", {}, el("summary", {}, name));
    box.addEventListener("toggle", () => {
      if (box.open && box.childElementCount === 1) box.append(shown(resolved(schema)));
    });
    return box;
  }
  const either = (schema.anyOf || schema.oneOf || []).map(parts).filter(Boolean);
  if (either.length) return el("div", {}, either);
  if (schema.items) return parts(schema.items);
  if (schema.properties) return members(schema);
  if (typeof schema.additionalProperties === "object") return parts(schema.additionalProperties);
  return null;
}

function members(schema) {
  const required = new Set(schema.required || []);
  return el("ul", { class: "members" }, Object.entries(schema.properties).map(([name, member]) =>
    item(name, member, required.has(name), parts(member))));
}

function item(name, schema, required, inner) {
  const deep = schema.$ref ? {} : schema;
  return el("li", {},
    el("span", { class: "name mono" }, name), " ", el("span", { class: "quiet" }, kindOf(schema)),
    required && el("span", { class: "must" }, "required"),
    el("span", { class: "bounds" }, bounds(deep)),
    deep.description && el("p", {}, inline(deep.description)),
    inner);
}

function shown(schema) {
  const box = el("div", {});
  if (schema.description) box.append(el("p", { class: "quiet" }, inline(schema.description)));
  const inner = schema.properties ? members(schema) : parts(schema);
  box.append(inner || el("p", {}, kindOf(schema), " ", el("span", { class: "bounds" }, bounds(schema))));
  return box;
}

// -- pages

function home() {
  return [
    el("h1", {}, spec.info.title, " ", el("small", {}, spec.info.version)),
    el("p", { class: "quiet" }, spec.info.summary),
    prose(spec.info.description),
    el("h2", {}, "Calls"),
    el("div", { class: "tags" }, spec.tags.map((tag) => el("section", { class: "card" },
      el("h2", {}, tag.name), el("p", { class: "quiet" }, inline(tag.description)),
      el("p", {}, calls.filter((call) => call.operation.tags[0] === tag.name).flatMap((call, index) =>
        [index ? " · " : "", el("a", { href: `#${call.id}` }, call.operation.summary)]))))),
  ];
}

function schemas() {
  return [el("h1", {}, "Schemas"), Object.entries(spec.components.schemas).map(([name, schema]) =>
    el("section", { id: `schema-${name}` }, el("h2", {}, name), shown(schema)))];
}

function callPage(call) {
  const { operation } = call;
  const parameters = (operation.parameters || []).map(resolved);
  const body = operation.requestBody;
  const docs = el("div", {}, prose(operation.description));
  for (const [place, title] of [["path", "In the path"], ["query", "Query"], ["header", "Headers"]]) {
    const here = parameters.filter((each) => each.in === place);
    if (here.length === 0) continue;
    docs.append(el("h2", {}, title), el("ul", { class: "members" }, here.map((each) =>
      item(each.name, { ...each.schema, description: each.description }, each.required, null))));
  }
  if (body) {
    const types = Object.keys(body.content);
    docs.append(el("h2", {}, "Body ", el("small", {}, types.join(", "), body.required ? ", required" : ", optional")),
      shown(resolved(body.content[types[0]].schema)));
  }
  docs.append(el("h2", {}, "Answers"), ...Object.entries(operation.responses).map(([status, response]) => answer(status, response)));
  return [
    el("h1", {}, operation.summary),
    el("div", { class: "route" }, verb(call.verb), el("code", {}, call.path), el("small", {}, call.id)),
    el("div", { class: "columns" }, docs, tryIt(call, parameters, body)),
  ];
}

const verb = (name) => el("span", { class: `verb ${name}` }, name);

function answer(status, response) {
  const box = el("details", { class: "answer", open: status === "200" },
    el("summary", {}, el("span", { class: `status ${status < 400 ? "ok" : "no"}` }, status), inline(response.description)));
  if (response.headers) {
    box.append(el("h3", {}, "Headers"), el("ul", { class: "members" }, Object.entries(response.headers).map(([name, header]) =>
      item(name, { ...resolved(header).schema, description: resolved(header).description }, false, null))));
  }
  for (const [type, content] of Object.entries(response.content || {})) {
    box.append(el("h3", {}, type), parts(content.schema) || shown(content.schema));
    for (const example of Object.values(content.examples || {})) {
      box.append(el("details", {}, el("summary", {}, `Example: ${example.summary}`), el("pre", {}, pretty(example.value))));
    }
  }
  return box;
}

// -- trying a call

function field(parameter) {
  const { schema } = parameter;
  const isSwitch = schema.type === "boolean" || (schema.anyOf || []).some((each) => each.type === "boolean");
  const id = `p-${parameter.in}-${parameter.name}`;
  let input;
  if (isSwitch || schema.enum) {
    const choices = schema.enum || [true, false];
    input = el("select", { id }, el("option", { value: "" }, ""), choices.map((each) => el("option", { value: String(each) }, String(each))));
    if (parameter.name === "dry_run") input.value = "true"; // looking first costs nothing
  } else {
    const hint = schema.examples ? schema.examples[0] : schema.minimum != null ? `${schema.minimum} … ${schema.maximum ?? ""}` : "";
    input = el("input", { id, placeholder: hint, autocomplete: "off", spellcheck: "false",
      list: parameter.in === "path" && parameter.name === "name" ? "names" : null });
  }
  return { parameter, input, row: el("div", { class: "field" }, el("label", { for: id, class: "mono" }, parameter.name), input) };
}

function tryIt(call, parameters, body) {
  const fields = parameters.map(field);
  const names = el("datalist", { id: "names" });
  const type = body && Object.keys(body.content)[0];
  const examples = body ? Object.values(body.content[type].examples || {}) : [];
  const text = body && el("textarea", { "aria-label": "Body", spellcheck: "false" });
  if (text && examples.length) text.value = pretty(examples[0].value);
  const chosen = examples.length > 1 && el("select", { "aria-label": "Example", onchange: () => {
    text.value = pretty(examples[chosen.selectedIndex].value);
  } }, examples.map((each) => el("option", {}, each.summary)));
  const dry = fields.find((each) => each.parameter.name === "dry_run");
  const real = el("p", { class: "real", role: "status" });
  const command = el("pre", {});
  const output = el("div", { "aria-live": "polite" });
  const send = el("button", { class: "send" }, "Send");
  const stop = el("button", { type: "button", disabled: true }, "Stop");
  let running = null;

  function request() {
    let path = call.path;
    const query = [];
    const headers = {};
    for (const { parameter, input } of fields) {
      const value = input.value.trim();
      if (parameter.in === "path") path = path.replace(`{${parameter.name}}`, encodeURIComponent(value) || `{${parameter.name}}`);
      else if (value === "") continue;
      else if (parameter.in === "query") query.push(`${encodeURIComponent(parameter.name)}=${encodeURIComponent(value)}`);
      else headers[parameter.name] = value;
    }
    if (text && text.value.trim()) headers["Content-Type"] = type;
    return { url: path + (query.length ? `?${query.join("&")}` : ""), headers, body: text && text.value.trim() ? text.value : null };
  }

  function preview() {
    const { url, headers, body: content } = request();
    const quoted = (value) => `'${value.replaceAll("'", "'\\''")}'`;
    const lines = [`curl${call.verb === "get" ? "" : ` -X ${call.verb.toUpperCase()}`} ${quoted(location.origin + url)}`];
    for (const [name, value] of Object.entries(headers)) lines.push(`-H ${quoted(`${name}: ${value}`)}`);
    if (content) lines.push(`-d ${quoted(content)}`);
    command.textContent = lines.join(" \\\n  ");
    const changes = call.verb !== "get" && (!dry || dry.input.value !== "true");
    real.textContent = changes ? "This changes the host." : "";
    send.disabled = fields.some(({ parameter, input }) => parameter.required && !input.value.trim());
  }

  async function submit(event) {
    event.preventDefault();
    if (running) return;
    running = new AbortController();
    stop.disabled = false;
    const { url, headers, body: content } = request();
    const status = el("p", {}, "…");
    const answer_ = el("pre", {});
    output.replaceChildren(el("h2", {}, "Answer"), status, answer_);
    const begun = performance.now();
    try {
      const response = await fetch(url, { method: call.verb.toUpperCase(), headers, body: content, signal: running.signal });
      const shownHeaders = [...response.headers].filter(([name]) => !["content-length", "date"].includes(name));
      status.replaceChildren(el("span", { class: `status ${response.ok ? "ok" : "no"}` }, `${response.status} ${response.statusText}`));
      answer_.before(el("pre", {}, shownHeaders.map(([name, value]) => `${name}: ${value}`).join("\n")));
      const reader = response.body ? response.body.pipeThrough(new TextDecoderStream()).getReader() : null;
      let all = "";
      for (let part; reader && !(part = await reader.read()).done;) {
        all += part.value;
        answer_.textContent = all.slice(-200_000); // a stream may go on for days
      }
      status.append(el("small", {}, `${Math.round(performance.now() - begun)} ms`));
      if (/json/.test(response.headers.get("content-type") || "")) {
        try { answer_.textContent = pretty(JSON.parse(all)); } catch { /* lines of JSON stay lines */ }
      }
    } catch (error) {
      status.append(el("span", { class: "status no" }, error.name === "AbortError" ? "stopped" : String(error)));
    } finally {
      running = null;
      stop.disabled = true;
    }
  }

  stop.addEventListener("click", () => running && running.abort());
  const form = el("form", { class: "try card", oninput: preview, onchange: preview, onsubmit: submit },
    el("h2", {}, "Try it"), names, fields.map((each) => each.row),
    text && [el("h3", {}, "Body"), chosen, text], real,
    el("div", { class: "buttons" }, send, stop), command, output);
  preview();
  if (fields.some((each) => each.input.getAttribute("list"))) {
    fetch("/api/v1/interfaces?limit=1000").then((response) => response.json()).then((found) =>
      names.append(...found.interfaces.map((each) => el("option", { value: each.spec.name })))).catch(() => {});
  }
  return form;
}

// -- the whole

function sidebar(filter = "") {
  const words = filter.toLowerCase().split(/\s+/).filter(Boolean);
  const matches = (call) => words.every((word) =>
    `${call.verb} ${call.path} ${call.id} ${call.operation.summary}`.toLowerCase().includes(word));
  const here = location.hash.slice(1);
  document.getElementById("calls").replaceChildren(...spec.tags.flatMap((tag) => {
    const found = calls.filter((call) => call.operation.tags[0] === tag.name && matches(call));
    return found.length ? [el("h2", {}, tag.name), ...found.map((call) =>
      el("a", { href: `#${call.id}`, title: call.path, "aria-current": call.id === here && "page" },
        verb(call.verb), el("span", {}, call.operation.summary)))] : [];
  }));
}

function show() {
  const here = location.hash.slice(1);
  const call = calls.find((each) => each.id === here);
  const page = call ? callPage(call) : here === "schemas" ? schemas() : home();
  document.getElementById("main").replaceChildren(...page.flat(Infinity).filter(Boolean));
  document.title = call ? `${call.operation.summary} · tunledger API` : "tunledger API";
  sidebar(document.getElementById("filter").value);
  scrollTo(0, 0);
}

async function start() {
  const response = await fetch("/schema/openapi.json");
  if (!response.ok) throw new Error(`/schema/openapi.json: ${response.status}`);
  spec = await response.json();
  calls = Object.entries(spec.paths).flatMap(([path, methods]) =>
    VERBS.filter((name) => methods[name]).map((name) => ({ id: methods[name].operationId, verb: name, path, operation: methods[name] })));
  document.getElementById("version").textContent = spec.info.version;
  const filter = document.getElementById("filter");
  filter.addEventListener("input", () => sidebar(filter.value));
  addEventListener("keydown", (event) => {
    if (event.key === "/" && !/INPUT|TEXTAREA|SELECT/.test(document.activeElement.tagName)) {
      event.preventDefault();
      filter.focus();
    }
  });
  addEventListener("hashchange", show);
  show();
}

start().catch((error) => {
  document.getElementById("main").replaceChildren(el("p", {}, `The document could not be read: ${error.message}`));
});
