"""What a new cluster is made of: ports, server.properties, certificates."""

import base64
import fcntl
import json
import os
import random
import re
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

from lib.node import HERE, Failure, Missing

HOST = "127.0.0.1"
# Kafka's own, each of which is the name of its listener here.
PROTOCOLS = {"PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"}
# What a cluster is made with, unless told otherwise.
OPTIONS = {"nodes": None, "heap": "256m", "secure": False, "users": "worker", "listeners": "", "advertise": [],
           "property": []}


def take_ports(folder, count):
    """Ports for a new cluster. They keep being its own while a node is down, so they lie below those that the system
    hands out, and other clusters of this script are told of them in a file."""
    try:
        top = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    except OSError:
        top = 32768
    low = 10000 if top > 12000 else 1024
    register = Path(tempfile.gettempdir()) / f"blipstream-kafka-ports-{os.getuid()}"
    with open(os.open(register, os.O_RDWR | os.O_CREAT, 0o600), "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        taken = {port: owner for port, owner in json.loads(file.read() or "{}").items() if os.path.isdir(owner)}
        ports = []
        for port in random.sample(range(low, top), min(1000, top - low)):
            if len(ports) == count:
                break
            with socket.socket() as probe:
                # As Java does: what lingers of a closed connection is no hindrance.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind((HOST, port))
                except OSError:
                    continue
            if str(port) not in taken:
                ports.append(port)
        if len(ports) < count:
            raise Failure(f"no free ports between {low} and {top}")
        taken.update({str(port): str(folder) for port in ports})
        file.seek(0)
        file.truncate()
        json.dump(taken, file)
    return ports


def new_cluster(folder, args):
    names = [name.upper() for name in args.listeners.split(",") if name]
    bad = [name for name in names if not re.fullmatch(r"[A-Z][A-Z0-9_]*", name)]
    if bad or len(set(names)) < len(names) or {"CONTROLLER", *PROTOCOLS} & set(names):
        raise Failure(f"--listeners {args.listeners}: distinct names of letters and digits, none of Kafka's own")
    advertised = {}
    for text in args.advertise:
        match = re.fullmatch(r"(\w+)=(\d+):(\d+)", text)
        if not match or match[1].upper() not in names or not 1 <= int(match[2]) <= args.nodes:
            raise Failure(f"--advertise {text}: NAME=NODE:PORT with a name of --listeners and a node of this cluster")
        advertised[match[1].upper(), int(match[2])] = int(match[3])
    if bad := [pair for pair in args.property if "=" not in pair]:
        raise Failure(f"--property {bad[0]}: KEY=VALUE is wanted")
    main = "SASL_PLAINTEXT" if args.secure else "PLAINTEXT"
    names = ["CONTROLLER", main, *(["SSL", "SASL_SSL"] if args.secure else []), *names]
    ports = iter(take_ports(folder, args.nodes * len(names)))
    nodes = []
    for number in range(1, args.nodes + 1):
        listeners = {}
        for name in names:
            bind = next(ports)
            listeners[name] = {"bind": bind, "advertised": advertised.get((name, number), bind)}
        nodes.append({"node": number, "listeners": listeners})
    cluster = {"id": uuid(), "secure": args.secure, "heap": args.heap, "main_listener": main, "nodes": nodes}
    if args.secure:
        cluster["users"] = {name: f"{name}-secret" for name in ["admin", *filter(None, args.users.split(","))]}
        cluster["tls"] = make_certificates(folder / "tls")
        admin = login("admin", cluster["users"]["admin"])
        lines = ["security.protocol=SASL_PLAINTEXT", "sasl.mechanism=PLAIN", f"sasl.jaas.config={admin}"]
        (folder / "admin.properties").write_text("\n".join(lines) + "\n")
    common = (HERE / "server.properties").read_text()
    for node in nodes:
        place = folder / f"node-{node['node']}"
        place.mkdir()
        values = properties(cluster, node, folder)
        values.update(pair.split("=", 1) for pair in args.property)
        own = "".join(f"{key}={value}\n" for key, value in values.items())
        (place / "server.properties").write_text(f"{common}\n# This node.\n{own}")
    return cluster


def uuid():
    return base64.urlsafe_b64encode(b"\x01" + os.urandom(15)).decode().rstrip("=")


def properties(cluster, node, folder):
    """What a node has for itself in server.properties."""
    nodes, secure, main = cluster["nodes"], cluster["secure"], cluster["main_listener"]
    copies, acknowledging = len(nodes), min(2, len(nodes))
    own = node["listeners"]
    voters = [f"{n['node']}@{HOST}:{n['listeners']['CONTROLLER']['bind']}" for n in nodes]
    protocols = {name: name if name in PROTOCOLS else "PLAINTEXT" for name in own}
    if secure:
        protocols["CONTROLLER"] = "SASL_PLAINTEXT"
    values = {
        "node.id": node["node"],
        "controller.quorum.voters": ",".join(voters),
        "listeners": ",".join(f"{name}://{HOST}:{port['bind']}" for name, port in own.items()),
        "advertised.listeners": ",".join(
            f"{name}://{HOST}:{port['advertised']}" for name, port in own.items() if name != "CONTROLLER"),
        "listener.security.protocol.map": ",".join(f"{name}:{protocol}" for name, protocol in protocols.items()),
        "inter.broker.listener.name": main,
        "log.dirs": folder / f"node-{node['node']}" / "data",
        "default.replication.factor": copies,
        "min.insync.replicas": acknowledging,
        "offsets.topic.replication.factor": copies,
        "transaction.state.log.replication.factor": copies,
        "transaction.state.log.min.isr": acknowledging,
        "share.coordinator.state.topic.replication.factor": copies,
        "share.coordinator.state.topic.min.isr": acknowledging,
    }
    if not secure:
        return values
    tls = cluster["tls"]
    values.update({
        "sasl.enabled.mechanisms": "PLAIN,SCRAM-SHA-256,SCRAM-SHA-512",
        "sasl.mechanism.inter.broker.protocol": "PLAIN",
        "sasl.mechanism.controller.protocol": "PLAIN",
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "super.users": "User:admin",
        "allow.everyone.if.no.acl.found": "false",
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": tls["server"],
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": tls["ca"],
        # On SSL alone, a client certificate says who somebody is; without one they are User:ANONYMOUS.
        "listener.name.ssl.ssl.client.auth": "requested",
    })
    plain = login("admin", cluster["users"]["admin"])
    plain = plain.rstrip(";") + "".join(f' user_{name}="{word}"' for name, word in cluster["users"].items()) + ";"
    for listener in ("sasl_plaintext", "sasl_ssl", "controller"):
        values[f"listener.name.{listener}.plain.sasl.jaas.config"] = plain
        for number in ("256", "512"):
            scram = f"listener.name.{listener}.scram-sha-{number}.sasl.jaas.config"
            values[scram] = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
    return values


def login(user, word):
    module = "org.apache.kafka.common.security.plain.PlainLoginModule"
    return f'{module} required username="{user}" password="{word}";'


def make_certificates(folder):
    """A CA, a certificate for the nodes and one for a client, and a CA that has signed nothing."""
    if not shutil.which("openssl"):
        raise Missing("openssl is missing, which makes the certificates of --secure. apt-get install openssl")
    folder.mkdir()

    def openssl(*arguments):
        done = subprocess.run(["openssl", *map(str, arguments)], cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise Failure(f"openssl {' '.join(map(str, arguments))}:\n{done.stderr}")

    new = ["req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes"]
    for ca in ("ca", "other-ca"):
        openssl(*new, "-x509", "-days", 3650, "-subj", f"/CN=blipstream test {ca}", "-keyout", f"{ca}.key",
                "-out", f"{ca}.pem")
    uses = {"server": f"subjectAltName=DNS:localhost,IP:{HOST}", "client": "extendedKeyUsage=clientAuth"}
    for name, more in uses.items():
        (folder / f"{name}.ext").write_text(more + "\n")
        openssl(*new, "-subj", f"/CN={name}", "-keyout", f"{name}.key", "-out", f"{name}.csr")
        openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-days", 3650,
                "-extfile", f"{name}.ext", "-out", f"{name}.crt")
    # Kafka wants key and chain in one file.
    (folder / "server.pem").write_text((folder / "server.key").read_text() + (folder / "server.crt").read_text())
    files = {"ca": "ca.pem", "other_ca": "other-ca.pem", "server": "server.pem", "client_certificate": "client.crt",
             "client_key": "client.key"}
    return {name: str(folder / file) for name, file in files.items()}
