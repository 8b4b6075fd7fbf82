package PBA::Test::Front::Schema;

# The arguments and replies of Proxmox' commands: entries for query-commands and query-qmp-schema in QEMU's
# form, and the check of a call's arguments against them.

use v5.36;

use JSON::PP ();

my $json = JSON::PP->new->utf8->canonical->allow_nonref;

# Numbers that are higher than those of any real schema.
my %types = (
    9000 => { object => [] },
    9001 => {
        object => [
            ['pbs-dirty-bitmap', 'bool'],
            ['query-bitmap-info', 'bool'],
            ['pbs-dirty-bitmap-savevm', 'bool'],
            ['pbs-dirty-bitmap-migration', 'bool'],
            ['pbs-masterkey', 'bool'],
            ['pbs-library-version', 'str'],
            ['backup-access-api', 'bool'],
            ['backup-fleecing', 'bool'],
            ['backup-max-workers', 'bool'],
        ],
    },
    9002 => { object => [['target-id', 'str'], ['devices', '[9003]']] },
    9003 => { object => [['device', 'str'], ['bitmap-mode', '9004', 'optional']] },
    9004 => { enum => [qw(none new use)] },
    9005 => {
        object => [
            ['node-name', 'str'],
            ['device', 'str'],
            ['size', 'int'],
            ['bitmap-node-name', 'str', 'optional'],
            ['bitmap-name', 'str', 'optional'],
            ['bitmap-action', '9006', 'optional'],
        ],
    },
    9006 => { enum => [qw(not-used not-used-removed new used invalid missing-recreated)] },
    9007 => { object => [['target-id', 'str'], ['success', 'bool']] },
    9008 => {
        object => [['drive', 'str'], ['action', '9006'], ['size', 'int'], ['dirty', 'int']],
    },
    9009 => {
        object => [
            (map { [$_, 'str', 'optional'] } qw(status errmsg)),
            (map { [$_, 'int', 'optional'] } qw(total dirty transferred zero-bytes reused)),
            (map { [$_, 'int', 'optional'] } qw(start-time end-time)),
            (map { [$_, 'str', 'optional'] } qw(backup-file uuid)),
            ['finishing', 'bool'],
        ],
    },
    9010 => {
        object => [
            ['target-id', 'str'],
            ['devlist', 'str', 'optional'],
            ['bitmap-name', 'str', 'optional'],
        ],
    },
);

my %commands = (
    'query-proxmox-support' => ['9000', '9001'],
    'backup-access-setup' => ['9002', '[9005]'],
    'backup-access-teardown' => ['9007', '9000'],
    'query-pbs-bitmap-info' => ['9000', '[9008]'],
    'query-backup' => ['9000', '9009'],
    'backup-cancel' => ['9000', '9000'],
);

my %expected = (str => 'string', bool => 'boolean');

sub new ($class, $form) {
    my %mine = %commands;
    $mine{'backup-access-setup'} = ['9010', '[9005]'] if $form eq 'devlist';
    return bless { form => $form, commands => \%mine }, $class;
}

# Adds the front's commands to the text of a reply of the stock QEMU.
sub extend ($self, $command, $reply) {
    my @entries;
    if ($command eq 'query-commands') {
        @entries = map { { name => $_ } } sort(keys(%{ $self->{commands} }));
    }
    elsif ($command eq 'query-qmp-schema') {
        @entries = $self->_schema;
    }
    return $reply if !@entries || $reply !~ /\A\{"return":/;
    my $more = join(', ', map { $json->encode($_) } @entries);
    return $reply =~ s/\]\s*\}\s*\z/, $more]}/r;
}

sub _schema ($self) {
    my ($commands, %seen, @entries) = ($self->{commands});
    my @queue = map { @{ $commands->{$_} } } sort(keys(%$commands));
    while (defined(my $name = shift(@queue))) {
        next if $seen{$name}++ || exists($expected{$name}) || $name eq 'int';
        my ($entry, @used) = _schema_entry($name);
        push(@entries, $entry);
        push(@queue, @used);
    }
    for my $name (sort(keys(%$commands))) {
        my ($arguments, $result) = @{ $commands->{$name} };
        my %entry = (name => $name, 'arg-type' => $arguments, 'ret-type' => $result);
        push(@entries, { %entry, 'meta-type' => 'command' });
    }
    return @entries;
}

# Returns an entry and the names of the types that it refers to.
sub _schema_entry ($name) {
    if (my ($element) = $name =~ /\A\[(.*)\]\z/) {
        my %entry = (name => $name, 'element-type' => $element, 'meta-type' => 'array');
        return (\%entry, $element);
    }
    my $type = $types{$name};
    if (my $values = $type->{enum}) {
        my @members = map { { name => $_ } } @$values;
        my %entry = (name => $name, members => \@members, values => $values);
        return { %entry, 'meta-type' => 'enum' };
    }
    my @members = map { _schema_member(@$_) } @{ $type->{object} };
    my %entry = (name => $name, members => \@members, 'meta-type' => 'object');
    return (\%entry, map { $_->[1] } @{ $type->{object} });
}

sub _schema_member ($name, $type, $optional = undef) {
    return { name => $name, type => $type, $optional ? (default => undef) : () };
}

# Dies with QEMU's message if the arguments do not match. QEMU itself checks all other commands.
sub check ($self, $command, $arguments) {
    my $known = $self->{commands}{$command} // return;
    _check_object($types{ $known->[0] }{object}, $arguments, '');
    return;
}

sub _check_object ($members, $value, $path) {
    _wrong_type($path, 'object') if ref($value) ne 'HASH';
    my $prefix = $path eq '' ? '' : "$path.";
    my %left = %$value;
    for my $member (@$members) {
        my ($name, $type, $optional) = @$member;
        if (exists($left{$name})) {
            _check_value($type, delete($left{$name}), "$prefix$name", $name);
        }
        elsif (!$optional) {
            die { desc => "Parameter '$prefix$name' is missing" };
        }
    }
    for my $name (sort(keys(%left))) {
        die { desc => "Parameter '$prefix$name' is unexpected" };
    }
    return;
}

sub _check_value ($type, $value, $path, $name) {
    if (my ($element) = $type =~ /\A\[(.*)\]\z/) {
        _wrong_type($path, 'array') if ref($value) ne 'ARRAY';
        for my $i (0 .. $#$value) {
            _check_value($element, $value->[$i], "${path}[$i]", $name);
        }
    }
    elsif ($type eq 'bool') {
        _wrong_type($path, $expected{bool}) if !JSON::PP::is_bool($value);
    }
    elsif ($type eq 'str') {
        _wrong_type($path, $expected{str}) if !_is_string($value);
    }
    elsif (my $values = $types{$type}{enum}) {
        _wrong_type($path, $expected{str}) if !_is_string($value);
        return if grep { $_ eq $value } @$values;
        die { desc => "Parameter '$name' does not accept value '$value'" };
    }
    else {
        _check_object($types{$type}{object}, $value, $path);
    }
    return;
}

sub _is_string ($value) {
    return !ref($value) && $json->encode([$value]) =~ /\A\["/;
}

sub _wrong_type ($path, $type) {
    die { desc => "Invalid parameter type for '$path', expected: $type" };
}

1;
