// Numbers as the rest of fxopt writes them: three digits, in the unit that suits their size.
const UNITS = {
  s: [["s", 1], ["ms", 1e-3], ["µs", 1e-6], ["ns", 1e-9]],
  bytes: [["TiB", 2 ** 40], ["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10], ["B", 1]],
};

function general(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e-4 && size < 1e6) return String(Number(value.toPrecision(3)));
  return exponent(value).replace(/\.?0+e/, "e");
}

function exponent(value) {
  return Number(value).toExponential(2).replace(/e([+-])(\d)$/, "e$10$2");
}

function format(value, unit) {
  if (value === null || value === undefined) return "-";
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "nan" : value > 0 ? "inf" : "-inf";
  if (!(unit in UNITS)) return `${general(value)} ${unit}`.trim();
  if (unit === "s" && value === 0) return "0 s";
  // By what is shown: 999.9 µs is 1 ms, not 1000 µs.
  const fits = ([, least]) => Math.abs(value) >= 0.9995 * least;
  const [name, factor] = UNITS[unit].find(fits) ?? UNITS[unit].at(-1);
  const number = value / factor;
  return `${Math.abs(number) >= 100 || number === 0 ? Math.round(number) : Number(number.toPrecision(3))} ${name}`;
}

function change(before, after) {
  if (!before || after === before) return "";
  const share = after / before - 1;
  const digits = Math.abs(share) < 0.095 ? 1 : 0;
  return `${share > 0 ? "+" : "−"}${Math.abs(share * 100).toFixed(digits)}%`;
}
