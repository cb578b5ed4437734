// Asking the server: OpenAI's API by fetch, answers as server-sent events.
const LEAST_FOR_RATE = 10;  // tokens: below, the rate is that of the network's pauses

function headers() {
  const key = session.getItem("gpt2-key");
  return {"Content-Type": "application/json", ...(key ? {Authorization: "Bearer " + key} : {})};
}
async function complaint(response) {
  const body = await response.json().catch(() => null);
  if (response.status === 401) { $("key-label").hidden = false; showSettings(true); $("key").focus(); }
  return new Error(body?.error?.message ?? `the server answers ${response.status}`);
}
function asked() {
  const body = {model: model?.id, stream: true, stream_options: {include_usage: true}};
  for (const name of NUMBERS) body[name] = settings[name];
  if (/^-?\d+$/.test(settings.seed.trim())) body.seed = Number(settings.seed) + tries;
  return body;
}
// Calls `add` with each piece of text; gives {usage, finish, seconds, first}.
async function write(path, body, add, signal) {
  const began = performance.now(), found = {};
  const response = await fetch(path, {method: "POST", headers: headers(), body: JSON.stringify(body), signal});
  if (!response.ok) throw await complaint(response);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "";;) {
    const {value, done} = await reader.read();
    if (done) throw new Error("the connection was lost");
    const lines = (rest + value).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return found;
      const data = JSON.parse(line.slice(6));
      if (data.error) throw new Error(data.error.message);
      if (data.usage) found.usage = data.usage;
      const choice = data.choices[0], text = choice?.delta?.content ?? choice?.text ?? "";
      if (text || choice?.finish_reason) {
        found.first ??= (performance.now() - began) / 1000;
        found.seconds = (performance.now() - began) / 1000;
      }
      found.finish = choice?.finish_reason ?? found.finish;
      if (text) add(text);
    }
  }
}
function described({usage, finish, seconds, first}) {
  if (!usage) return "stopped";
  const count = usage.completion_tokens, parts = [`${count} token${count === 1 ? "" : "s"}`];
  const rate = count < LEAST_FOR_RATE ? 0 : (count - 1) / Math.max(seconds - first, 1e-3);
  if (rate) parts.push(`${rate < 100 ? rate.toFixed(1) : Math.round(rate)} tokens/s`);
  if (finish === "length") parts.push("cut at the limit");
  return parts.join(" · ");
}
function problem(error) { return error instanceof TypeError ? "the server does not answer" : error.message; }
